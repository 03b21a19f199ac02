"""Pruned checkpoints in llama.cpp: `python benchmarks/smaller_edge.py`; needs `llama-cpp-python` and the extra `gguf`.

`tiny` and `smol`, dense and pruned, as GGUF in float16, 8 and 4 bits, without recovery. llama.cpp reads test items,
with and without an image, and its distributions are held against those of transformers in float32, which runs the
checkpoint that the files were made from. Then smol's files take turns, each in a fresh process on one thread, round
after round: tokens read and written in a second of a core's time, and the memory that
it added to the process's.

llama.cpp's graph of the vision tower merges 2 × 2 patches, the embedded models' 4 × 4: their images reach llama.cpp as
what transformers' tower makes of them.

Every model's agreement, and the speeds, are cells under `results/smaller`; what is missing is made. `--check N` makes N
agreements again. The last line is JSON: `gguf_kl` by model, widths and type, mean over all tokens of the items;
`same_answer`, how often the likeliest token at the end of an item is the same; `worst_f16_item`, of all items the mean
over its tokens at float16 where it is largest; `speed`, by widths and type.
"""

import json
import subprocess
import sys
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from cells import cell, run

from lop.checkpoint.export import convert
from lop.model.adapter import load_model
from lop.model.find import EMBEDDED, find_samples, fingerprint_model
from lop.model.samples import Sample, fingerprint_samples, load_sample_sets
from lop.model.smol import NAME as SMOL
from lop.run.config import find_config, load_config
from lop.run.run import Run, shipped_run
from lop.space.allocation import Allocation, project, uniform
from lop.stages.calibrate import calibrate_stage
from lop.stages.prune import export_allocation
from lop.storage.files import read_json
from lop.storage.fingerprint import fingerprint
from tests.agreement import divergence, says
from tests.llama import Llama, quantise

RESULTS = Path(__file__).parent.parent / "results" / "smaller"
SEARCHED = Path(__file__).parent.parent / "results" / "smol" / "choice-lop-search-0.3-0.json"
# By the format that writes them; the last one by llama.cpp's own quantiser from the float16 file.
TYPES = {"f16": "gguf", "q8_0": "gguf-q8_0", "q4_1": "gguf-q4_1", "q4_0": "gguf-q4_0", "q4_k_m": None}
# What a variant's layers keep: the dense model, what LOP's search found, all alike.
VARIANTS = ("0.0-dense", "0.3-search", "0.3-uniform", "0.5-uniform")
ITEMS = 12
ROUNDS = 2
TIMED = ("f16", "q4_0")
PROBE = Path(__file__).with_name("edge_probe.py")


class Bench:
    """The checkpoints, each made when it is first needed.

    Args:
        folder: keeps them.
        runs: keeps the calibration of `smol`.
    """

    def __init__(self, folder: Path, runs: Path) -> None:
        self._folder, self._runs = folder, runs

    @cached_property
    def runs(self) -> dict[str, Run]:
        """What the models are pruned by."""
        smol = Run(load_config(find_config(SMOL), ["workers=0"]), self._runs / "calibration")
        calibrate_stage(smol)
        tiny = shipped_run(load_config(find_config(EMBEDDED)))
        assert tiny is not None
        return {EMBEDDED: tiny, SMOL: smol}

    def allocation(self, model: str, variant: str) -> Allocation:
        """The widths of a variant."""
        ratio, kind = variant.split("-")
        space = self.runs[model].space
        budget = space.budget(float(ratio))
        if kind != "search":
            return uniform(space, budget)
        if model == SMOL:
            return Allocation(tuple(read_json(SEARCHED)["widths"]))
        return project(np.linspace(0.1, 0.5, space.layers), space, budget)

    def checkpoint(self, model: str, variant: str) -> Path:
        """In transformers' format."""
        run, out = self.runs[model], self._folder / f"{model}-{variant}"
        if variant == VARIANTS[0]:
            return run.model_folder
        if not out.exists():
            print(f"{out.name} …", flush=True)
            export_allocation(run, self.allocation(model, variant), out, target=float(variant[:3]), recovery="none")
        return out

    def file(self, model: str, variant: str, kind: str) -> Path:
        """The language model's GGUF file."""
        out, format = self._folder / f"{model}-{variant}-{kind}", TYPES[kind]
        if format is None:
            if not (file := out.with_name(f"{out.name}.gguf")).exists():
                quantise(self.file(model, variant, "f16"), file)
            return file
        if not out.exists():
            convert(self.checkpoint(model, variant), out, format=format)
        return out / f"model-{kind}.gguf"

    def items(self, model: str) -> list[Sample]:
        """Test items of every kind, as many of each as there are."""
        test = load_sample_sets(find_samples(model)).test
        shuffled = [test[index] for index in np.random.default_rng(0).permutation(len(test))]
        kinds = [
            [sample for sample in shuffled if bool(sample.image) == shown and sample.is_prose == prose]
            for shown, prose in ((True, False), (False, False), (False, True))
        ]
        return [sample for kind in filter(None, kinds) for sample in kind[: ITEMS // len(list(filter(None, kinds)))]]

    def made_from(self, model: str, variant: str) -> str:
        """What a model's cell depends on."""
        folder, widths = self.runs[model].model_folder, self.allocation(model, variant).widths
        items = fingerprint_samples(self.items(model))
        return fingerprint([fingerprint_model(folder), widths, list(TYPES), version("llama-cpp-python"), items])

    def agreement(self, model: str, variant: str) -> dict[str, Any]:
        """How far llama.cpp's distributions are from transformers', by type."""
        network = load_model(self.checkpoint(model, variant), device="cpu", dtype="float32")
        read = [(sample, *says(network, sample)) for sample in self.items(model)]
        found: dict[str, Any] = {}
        for kind in TYPES:
            with Llama(self.file(model, variant, kind), repacked=False) as llama:
                items = [divergence(llama, *rest) | {"image": bool(sample.image)} for sample, *rest in read]
            kl = np.concatenate([item.pop("kl") for item in items])
            found[kind] = {
                "kl": float(kl.mean()),
                "worst_item": max(item["mean"] for item in items),
                "kl_with_image": float(np.mean([item["mean"] for item in items if item["image"]])),
                "same_answer": float(np.mean([item["same"] for item in items])),
                "items": len(items),
                "tokens": len(kl),
                "file_bytes": self.file(model, variant, kind).stat().st_size,
            }
        return found

    def speed(self) -> dict[str, Any]:
        """Of all files of `smol`, in turns; the best of the rounds, as others can only slow it."""
        files = {(variant, kind): self.file(SMOL, variant, kind) for variant in VARIANTS for kind in TIMED}
        seen: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in files}
        for turn in range(ROUNDS):
            for key, file in files.items():
                print(f"round {turn + 1} of {ROUNDS}: {' '.join(key)}", flush=True)
                done = subprocess.run(
                    [sys.executable, str(PROBE), str(file)], capture_output=True, text=True, check=True
                )
                seen[key].append(json.loads(done.stdout.splitlines()[-1]))
        made: dict[str, Any] = {}
        for (variant, kind), rounds in seen.items():
            best = {name: max(one[name] for one in rounds) for name in ("read", "written")}
            memory = min(one["added_bytes"] for one in rounds)
            size = files[variant, kind].stat().st_size
            made.setdefault(variant, {})[kind] = {**best, "added_bytes": memory, "file_bytes": size}
        return {"rounds": ROUNDS, "speed": made}


def _bench() -> Bench:
    return Bench(Path("runs/smaller-edge"), Path("runs/benchmark-smol"))


def agreements(bench: Bench) -> dict[tuple[str, str], dict[str, Any]]:
    """All cells of what agrees how far."""
    found = {}
    for model in (EMBEDDED, SMOL):
        for variant in VARIANTS:
            path = RESULTS / f"edge-{model}-{variant}.json"
            found[model, variant] = cell(
                path, bench.made_from(model, variant), lambda m=model, v=variant: bench.agreement(m, v)
            )
    return found


def summary() -> dict[str, Any]:
    """Makes the cells that are missing, and says what all of them say."""
    bench = _bench()
    lines: dict[str, Any] = {"llama_cpp_python": version("llama-cpp-python"), "gguf_kl": {}, "same_answer": {}}
    for (model, variant), found in agreements(bench).items():
        for kind in TYPES:
            one = found[kind]
            print(
                f"{model:<5} {variant:<12} {kind:<5} KL {one['kl']:.2e}  worst item {one['worst_item']:.2e}  "
                f"with an image {one['kl_with_image']:.2e}  same answer {one['same_answer']:.0%}  "
                f"{one['file_bytes'] / 1e6:.1f} MB"
            )
            for name, value in (("gguf_kl", one["kl"]), ("same_answer", one["same_answer"])):
                lines[name].setdefault(model, {}).setdefault(variant, {})[kind] = value
    lines["worst_f16_item"] = max(found["f16"]["worst_item"] for found in agreements(bench).values())
    made_from = fingerprint([bench.made_from(SMOL, variant) for variant in VARIANTS])
    speed = cell(RESULTS / "edge-speed.json", made_from, bench.speed)
    for variant, kinds in speed["speed"].items():
        for kind, one in kinds.items():
            print(
                f"smol  {variant:<12} {kind:<5} reads {one['read']:6.1f} tokens a second, writes "
                f"{one['written']:5.1f}, adds {one['added_bytes'] / 1e6:.0f} MB, file {one['file_bytes'] / 1e6:.1f} MB"
            )
    return lines | {"speed": speed["speed"]}


def check(count: int) -> tuple[int, int]:
    """Makes so many agreements again, chosen at random; returns how many were made and how many came out alike."""
    bench, agree = _bench(), 0
    known = agreements(bench)
    chosen = [list(known)[index] for index in np.random.default_rng().permutation(len(known))[:count]]
    for model, variant in chosen:
        again = bench.agreement(model, variant)
        pairs = [(known[model, variant][kind]["kl"], again[kind]["kl"]) for kind in TYPES]
        print(f"{model} {variant}: {pairs}")
        agree += all(np.isclose(old, new, rtol=0.1, atol=1e-5) for old, new in pairs)
    return len(chosen), agree


if __name__ == "__main__":
    run("smaller_edge", "Pruned checkpoints in llama.cpp.", summary, check)
