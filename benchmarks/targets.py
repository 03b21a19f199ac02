"""Whether memory and latency come out as they were predicted: `python benchmarks/targets.py`.

Each measurement is a small file under `results/targets`, with what it was made from; what is missing is made, and the
summary is printed from the files. `--check N` makes N of them again, chosen at random, and says how far they are off.
`--only memory` or `--only latency` makes one part, `--model` the memory of one model.

**Memory**: a process of its own loads the model with transformers, answers once with a prompt of the same shape, so
that what libraries keep for it is there, and then again: how much its resident memory then rises at most (the kernel's
high-water mark), and the weights, are what was measured. glibc is told to give back what is freed
(`MALLOC_MMAP_THRESHOLD_`); `kept` cells leave it as it is. `smol` is whole, also with half of each FFN; `3b` has the
shape of Qwen2.5-VL-3B and random weights, `3b-cut` the same with its first 4 layers and 4 blocks of the tower, where
what is held beside the weights is a larger part.

**Latency**: `lop profile` of `smol`, which measures models of mixed widths at 20, 30 and 50% in the same rounds. It is
one thread's CPU time and not the wall's, so that others who use the machine do not count.

**`--device cuda`** measures both on a GPU, in `memory-cuda-…` and `latency-cuda-…` cells: models in the shapes of
Qwen2.5-VL-3B and -7B are built there with random bfloat16 weights (`benchmarks/built.py`), each once for all of its
loads. Measured is `torch.cuda.max_memory_allocated()`, also by phase: `seeing` until the vision tower is done,
`reading` until the first logits are there, `answering`. Beside it stand what the allocator was asked for (`requested`)
and what it took from the GPU (`reserved`), what was `kept` before by libraries and by rounding up the weights, the
`holes` between these, what CUDA's `context` takes, which a card must have besides, and the `margin`: by how much of the
prediction the allocator's memory had to be larger for the same run to go through. `--seconds N` begins nothing after N
seconds; a load that fails is named, and the others go on. `--model small` tries all of it on the CPU, where the figures
mean nothing.

The last line is JSON: `memory_error`, the largest relative error of the peak, by model and load, `memory_error_beside`,
the same of what is held beside the weights (on a GPU without what was `kept` before), `latency_error` by phase and
ratio.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from built import Case, answer, measure_built, names_of, narrow, prompt, restart_peak, status
from cells import cell
from photographs import SHAPES, make_checkpoint

from lop.model.find import find_model
from lop.model.shape import read_shape
from lop.run.config import find_config, load_config
from lop.run.run import Run
from lop.space.memory import Load, working_bytes
from lop.stages.profile import profile_stage
from lop.storage.files import read_json
from lop.storage.fingerprint import fingerprint

RESULTS = Path(__file__).parent.parent / "results" / "targets"
# From here on glibc takes what is asked for from the kernel, and gives it back at once.
_THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
_CONTEXT = 128
_SMALL, _MEGAPIXEL = 64 * 64, 1036 * 1036
CASES = (
    Case("smol", Load(512, 4, pixels=_SMALL)),
    Case("smol", Load(2048, 0, pixels=_SMALL)),
    Case("smol", Load(2048, 0, pixels=_SMALL), kept=True),
    Case("smol", Load(2048, 4, pixels=_SMALL), share=0.5),
    Case("smol", Load(512, 1, 4, _SMALL)),
    Case("3b-cut", Load(1024, 0, pixels=_MEGAPIXEL)),
    Case("3b-cut", Load(4096, 2, pixels=_MEGAPIXEL)),
    Case("3b-cut", Load(1536, 1, pixels=_MEGAPIXEL), share=0.5),
    Case("3b", Load(1024, 0, pixels=_MEGAPIXEL)),
    Case("3b", Load(1536, 1, pixels=_MEGAPIXEL)),
)


def main() -> None:
    """Makes what is missing and prints the summary."""
    parser = argparse.ArgumentParser(description="Memory and latency, predicted and measured.")
    parser.add_argument("--check", type=int, metavar="N", help="make N cells again and compare")
    parser.add_argument("--only", choices=("memory", "latency"))
    models = sorted({case.model for case in CASES} | set(SHAPES))
    parser.add_argument("--model", choices=models, help="memory of this one alone; on a GPU latency, too")
    parser.add_argument("--device", default="cpu", help="cpu, or what torch calls a GPU: cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="on a GPU: nothing is begun after so many")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the cells")
    parser.add_argument("--folder", type=Path, help="for checkpoints, 8 GB; a temporary folder if left out")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), json.loads(options.measure[1]))))
        return
    if options.device != "cpu" or options.model == "small":
        print(json.dumps({"benchmark": "targets", **on_device(options)}))
        return
    with TemporaryDirectory(dir=options.folder) as parent:
        if options.check is not None:
            check(options.check, Path(parent), options.results)
            return
        summary: dict[str, Any] = {"benchmark": "targets"}
        if options.only != "latency":
            cases = [case for case in CASES if options.model in (None, case.model)]
            summary |= memory_errors([memory_cell(case, Path(parent), options.results) for case in cases])
        if options.only != "memory":
            summary |= latency_errors(latency_cell(options.results))
        print(json.dumps(summary))


def on_device(options: argparse.Namespace) -> dict[str, Any]:
    """The summary of models that are built on a device; with `--check N` how far N of them, made again, are off."""
    device = torch.device(options.device)
    models = [options.model] if options.model else ["3b", "7b"]
    limits: dict[str, Any] = {"seconds": options.seconds, "only": options.only}
    if options.check is not None:
        kinds = (options.only,) if options.only else ("memory", "latency")
        names = [name for name in names_of(models, device) if name.startswith(kinds)]
        chosen = set(random.sample(names, min(options.check, len(names))))
        with TemporaryDirectory() as again:
            rows = measure_built(models, device, Path(again), names=chosen, **limits)
        found = {"check": {row["name"]: _difference(row, options.results) for kind in rows[:2] for row in kind}}
        return {**found, "missing": rows[2]}
    memory, latency, missing = measure_built(models, device, options.results, names=set(), **limits)
    summary: dict[str, Any] = {"missing": missing}
    if memory:
        summary |= memory_errors(memory) | {"margins": {row["name"]: row["margin"] for row in memory}}
    for row in latency:
        summary[row["name"]] = latency_errors(row)
    return summary


def _difference(row: dict[str, Any], results: Path) -> dict[str, float]:
    """By how much what was measured now is off from what was measured before."""
    old = read_json(results / f"{row['name']}.json")
    if "measured" in row:
        return {"measured": row["measured"] / old["measured"] - 1}
    return {
        f"{phase} {now['ratio']:g}": now["measured"] / before["measured"] - 1
        for phase, times in row["checks"].items()
        for now, before in zip(times, old["checks"][phase])
    }


def memory_cell(case: Case, folder: Path, results: Path) -> dict[str, Any]:
    """Peak bytes of a case, measured and predicted."""
    made_from = fingerprint([asdict(case), torch.__version__, "2"])
    found = cell(results / f"memory-{case.name}.json", made_from, lambda: _measured(case, folder))
    return {"name": case.name, **found}


def _measured(case: Case, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({} if case.kept else _THRESHOLD)}
    model = _checkpoint(case.model, folder)
    command = [sys.executable, __file__, "--measure", str(model), json.dumps(asdict(case))]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _checkpoint(model: str, folder: Path) -> Path:
    """The model's folder; random weights are made at first use."""
    if model == "smol":
        return find_model(model)
    if not (place := folder / model).exists():
        shape = SHAPES["3b"]
        if model == "3b-cut":
            shape = {**shape, "num_hidden_layers": 4, "vision": {**shape["vision"], "depth": 4}}
        make_checkpoint(place, shape)
    return place


def measure(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: the peak of a run whose shape the process knows already."""
    import lop

    torch.set_num_threads(1)
    load, share = Load(**case["load"]), case["share"]
    with torch.inference_mode():
        model = lop.load(folder, device="cpu", dtype="bfloat16")
        width = narrow(model, share * model.config.text_config.intermediate_size)
        inputs = prompt(model, load, read_shape(folder, 2).tower.merge)
        weights = sum({each.data_ptr(): each.nbytes for each in model.parameters()}.values())
        answer(model, inputs)
        gc.collect()
        before = status("VmRSS")
        restart_peak()
        answer(model, inputs)
        peak = status("VmHWM") - before
    # The pixels are there before and stay.
    pixels = inputs["pixel_values"].nbytes if load.images else 0
    beside = working_bytes(read_shape(folder, 2), load, width)
    return {
        "weights": weights,
        "measured": weights + pixels + peak,
        "predicted": weights + beside,
    }


def memory_errors(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest errors by model and load."""
    errors, beside = {}, {}
    for row in found:
        measured, predicted, weights = row["measured"], row["predicted"], row["weights"]
        errors[row["name"]] = abs(predicted / measured - 1)
        # On a GPU there is something beside the weights before anything is computed.
        error = (predicted - weights) / (measured - weights - row.get("kept", 0)) - 1
        beside[row["name"]] = abs(error)
        print(
            f"{row['name']:<40} weights {weights / 2**20:8.1f}  measured {measured / 2**20:8.1f}  "
            f"predicted {predicted / 2**20:8.1f} MiB  {predicted / measured - 1:+.2%}  beside the weights {error:+.2%}"
        )
    plain = [error for name, error in errors.items() if not name.endswith("kept")]
    return {"memory_error": max(plain), "memory_errors": errors, "memory_error_beside": beside}


def latency_cell(results: Path) -> dict[str, Any]:
    """The profile of `smol` on this machine."""
    config = replace_threads(load_config(find_config("smol")))

    def make() -> dict[str, Any]:
        with TemporaryDirectory() as folder:
            profile_stage(Run(config, Path(folder)), Path(folder) / "profile.json", context=_CONTEXT, clock=_Alone())
            return dict(read_json(Path(folder) / "profile.json"))

    return cell(results / "latency-smol.json", fingerprint([torch.__version__, _CONTEXT, "2"]), make)


class _Alone:
    """Time as on a core of its own: what the one thread that computes has had of a core that others want, too."""

    def mark(self) -> float:
        return time.thread_time()

    def seconds(self, start: float, end: float) -> float:
        return end - start


def replace_threads(config: Any) -> Any:
    """The same on one thread of a CPU."""
    return config.model_copy(update={"threads": 1, "device": "cpu"})


def latency_errors(profile: dict[str, Any]) -> dict[str, Any]:
    """By phase and ratio."""
    errors = {}
    for phase, rows in profile["checks"].items():
        for row in rows:
            error = row["predicted"] / row["measured"] - 1
            errors[f"{phase} {row['ratio']:g}"] = abs(error)
            rate = f"{1000 * row['measured']:8.3f} ms a token, {1 / row['measured']:.0f} tokens a second"
            print(f"{phase:<8} {row['ratio']:.0%}  {rate}  {error:+.1%}")
    return {"latency_error": errors, "device": profile["device"]}


def check(count: int, folder: Path, results: Path) -> None:
    """Makes some cells again beside the old ones, and prints how far they are off."""
    again = folder / "again"
    names = [*(case.name for case in CASES), "latency"]
    for name in random.sample(names, min(count, len(names))):
        if name == "latency":
            old, new = (latency_errors(latency_cell(place))["latency_error"] for place in (results, again))
            print(name, {key: f"{old[key]:.1%} then, {new[key]:.1%} now" for key in old})
            continue
        case = next(case for case in CASES if case.name == name)
        old, new = (memory_cell(case, folder, place) for place in (results, again))
        print(f"{name}: measured {old['measured']:,} then, {new['measured']:,} now")
        print(json.dumps({"name": name, "difference": new["measured"] / old["measured"] - 1}))


if __name__ == "__main__":
    main()
