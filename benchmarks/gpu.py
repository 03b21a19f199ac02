"""Everything that a GPU is asked for, in nine minutes: `python benchmarks/gpu.py`.

Needs torch, transformers and this checkout alone, no Ray. Builds Qwen2.5-VL-7B at its true shapes with random weights
on the device, and measures one part after the other, each printed and written to `--out` as soon as it is known; a part
for which there is no time left is left out and named, and one that fails says why. Weights being random, speed and
memory are real, answers are not.

The last line is the JSON of all parts, each with its seconds and the GiB that it allocated at most on the GPU:
`calibrate`; `naive` (two naive evaluators); `evaluate` (seconds dense and at 50%, share of the rate of a large product,
how many times as fast as the naive ways, milliseconds to switch); `factors` (seconds, bytes in the host, milliseconds
to refit a layer at a new width, a refitted candidate's time by an unrefitted one's); `export`; `compile`.

`--model tiny` tries the script on a CPU in a minute.
"""

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from evaluator import (  # type: ignore[import-not-found]
    clock,
    describe,
    draw,
    flops,
    gemm_rate,
    load,
    run_naive,
    switch_seconds,
    synchronize,
)

from lop.checkpoint.export import export
from lop.model.elastic import ElasticModel
from lop.model.encoding import encode
from lop.model.find import assets
from lop.model.importance import activation, order
from lop.model.repair import Refits, factors, refitted
from lop.model.samples import load_sample_sets
from lop.model.statistics import calibrate
from lop.run.config import find_config, load_config
from lop.search.evaluator import Evaluator
from lop.search.racing import Candidate
from lop.space.allocation import Allocation, Space, dense, uniform

_CONFIGS = {"tiny": "tiny", "7b": "qwen2_5_vl_7b"}
_GIB = 2**30
# Of a part: what it may take, seconds; less left, and it is not begun.
_LEAST = {"naive": 60, "factors": 90, "compile": 60, "export": 120}


class Bench:
    """The model, and what its parts come to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._started = time.perf_counter()
        self._options = options
        self.found: dict[str, Any] = {"benchmark": "gpu", "model": options.model, "left_out": []}
        config = load_config(find_config(_CONFIGS[options.model]))
        self._batch_tokens = config.batch_tokens
        self._model = load(options.model, options.device, "auto")
        self._space = Space(
            len(self._model.ffns), self._model.ffns[0].down_proj.weight.shape[1], config.granularity, config.max_ratio
        )
        sets = load_sample_sets(assets() / "samples")
        self._calibration, self._reward = sets.calibration[: options.samples], sets.reward[: options.samples]
        self.found |= {"device": describe(self._model), "torch": torch.__version__, "threads": torch.get_num_threads()}

    def run(self) -> None:
        """All parts."""
        self._part("calibrate", self._calibrate)
        self._part("naive", self._naive)
        self._elastic = ElasticModel(self._model, self._order)
        self._encoded = encode(self._model, self._reward, batch_tokens=self._batch_tokens)
        self._part("evaluate", self._evaluate)
        self._part("factors", self._factors)
        self._part("export", self._export)
        self._part("compile", self._compile)  # Last: the FFNs stay compiled.

    def _part(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        left = self._options.minutes * 60 - (time.perf_counter() - self._started)
        if left < _LEAST.get(name, 0):
            self.found["left_out"].append(name)
            print(f"{name}: left out, {left:.0f} s are left", flush=True)
            return
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        try:
            part = measure()
            synchronize(self._model)
        except Exception as error:  # The others are not to be lost by it.
            traceback.print_exc()
            part = {"failed": f"{type(error).__name__}: {error}"}
        part["part_seconds"] = time.perf_counter() - started
        if self._on_gpu:
            part["peak_gib"] = torch.cuda.max_memory_allocated() / _GIB
        self.found[name] = part
        print(name, json.dumps(part), flush=True)
        self._options.out.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    @property
    def _on_gpu(self) -> bool:
        return self._model.device.type == "cuda"

    def _calibrate(self) -> dict[str, Any]:
        started = time.perf_counter()
        encoded = encode(self._model, self._calibration, batch_tokens=self._batch_tokens)
        encode_seconds = time.perf_counter() - started
        started = time.perf_counter()
        self._order = order(activation(calibrate(self._model, encoded)))
        self._calibrated = encoded
        tokens = sum(map(len, encoded.batches))
        return {"encode_seconds": encode_seconds, "seconds": time.perf_counter() - started, "tokens": tokens}

    def _naive(self) -> dict[str, Any]:
        few = self._reward[: self._options.naive]
        chosen = [uniform(self._space, self._space.budget(0.3))]
        (single,), (batched,) = run_naive(self._model, self._order, few, chosen, self._batch_tokens)
        encoded = encode(self._model, few, batch_tokens=self._batch_tokens)
        return {
            "questions": len(few),
            "one_at_a_time_seconds": single.seconds,
            "batched_seconds": batched.seconds,
            "tokens": sum(map(len, encoded.batches)),
        }

    def _times(self) -> dict[str, Any]:
        evaluator = Evaluator(self._elastic, self._encoded)
        space = self._space
        whole, half = (
            clock(lambda a=each: evaluator.evaluate(Candidate(a)), self._model)  # type: ignore[misc]
            for each in (dense(space), uniform(space, space.budget(0.5)))
        )
        return {"dense_seconds": whole, "half_seconds": half, "time_ratio_at_50": half / whole}

    def _evaluate(self) -> dict[str, Any]:
        times = self._times()
        rate = gemm_rate(self._model)
        share = flops(self._elastic, dense(self._space), self._encoded) / times["dense_seconds"] / rate
        questions, tokens = len(self._reward), sum(map(len, self._encoded.batches))
        few = self.found.get("naive")
        # By question: the naive ways are timed on fewer of them.
        ours = times["dense_seconds"] / questions
        faster = (
            {name: few[f"{name}_seconds"] / few["questions"] / ours for name in ("one_at_a_time", "batched")}
            if few
            else {}
        )
        return {
            **times,
            "questions": questions,
            "tokens": tokens,
            "gemm_tflops": rate / 1e12,
            "gemm_share": share,
            "switch_ms": 1000 * switch_seconds(self._elastic),
            "times_as_fast_as": faster,
        }

    def _factors(self) -> dict[str, Any]:
        started = time.perf_counter()
        made = factors(self._elastic.backbone, self._calibrated)
        synchronize(self._model)
        seconds = time.perf_counter() - started
        ffn = self._elastic.backbone.layers[0].ffn
        widths = [
            self._space.neurons * part // 8 // self._space.granularity * self._space.granularity for part in (2, 4, 6)
        ]
        solve = {
            str(width): 1000 * clock(lambda w=width: refitted(ffn.down, made[0], w), self._model) for width in widths
        }  # type: ignore[misc]
        mixed = draw(self._space, [0.3], 0.2, 1)[0]
        plain, refitting = (
            Evaluator(self._elastic, self._encoded, repair=repair)
            for repair in (None, Refits(made, cache_bytes=64 * _GIB))
        )
        cold = time.perf_counter()
        refitting.evaluate(Candidate(mixed))
        synchronize(self._model)
        cold = time.perf_counter() - cold
        warm, without = (clock(lambda e=each: e.evaluate(Candidate(mixed)), self._model) for each in (refitting, plain))  # type: ignore[misc]
        return {
            "seconds": seconds,
            "host_bytes": sum(each.nbytes for each in made),
            "solve_ms": solve,
            "cold_seconds": cold,
            "warm_seconds": warm,
            "refit_over_plain": warm / without,
        }

    def _compile(self) -> dict[str, Any]:
        self._elastic.compile()
        return self._times()

    def _export(self) -> dict[str, Any]:
        with TemporaryDirectory(dir=self._options.folder) as place:
            folder = Path(place)
            if self._options.model == "tiny":
                source = assets() / "model"
            else:
                source = folder / "dense"
                dense_weights(self._model, self._elastic, source)
                self._model.processor.save_pretrained(source)
            # Neurons as they stand: what is timed is reading and writing.
            plain = np.tile(np.arange(self._space.neurons), (self._space.layers, 1))
            widths = Allocation(uniform(self._space, self._space.budget(0.3)).widths)
            started = time.perf_counter()
            manifest = export(source, folder / "out", widths, plain, about={"target": 0.3})
            seconds = time.perf_counter() - started
            written = sum(file.stat().st_size for file in (folder / "out").iterdir())
        return {
            "seconds": seconds,
            "bytes": written,
            "gib_per_second": written / _GIB / seconds,
            "format": manifest["format"],
        }


def dense_weights(model: Any, elastic: ElasticModel, folder: Path) -> None:
    """Writes the dense model as transformers would: the elastic FFNs stand in the place of its own."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        plain = Qwen2_5_VLForConditionalGeneration._from_config(model.model.config, dtype=model.model.dtype)
    names = {"gate": "gate_proj.weight", "up": "up_proj.weight", "down": "down_proj.weight"}
    state = {}
    for name, value in model.model.state_dict().items():
        head, _, last = name.rpartition(".mlp.")
        state[f"{head}.mlp.{names[last]}" if last in names else name] = value
    for layer, ffn in enumerate(each.ffn for each in elastic.backbone.layers):
        prefix = f"model.language_model.layers.{layer}.mlp."
        state |= {prefix + names[part]: getattr(ffn, part) for part in names}
    plain.save_pretrained(folder, state_dict=state)


def main() -> None:
    """Measures all parts."""
    parser = argparse.ArgumentParser(description="Everything that a GPU is asked for, in nine minutes.")
    parser.add_argument("--model", choices=sorted(_CONFIGS), default="7b")
    parser.add_argument("--device", default="auto", help="auto (the first GPU if there is one), or what torch calls it")
    parser.add_argument("--samples", type=int, default=200, help="of calibration and of reward")
    parser.add_argument("--naive", type=int, default=32, help="questions for the naive ways")
    parser.add_argument("--minutes", type=float, default=9, help="no part is begun that might end after them")
    parser.add_argument("--folder", type=Path, help="for the export's files, 30 GB; a temporary folder if left out")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where the results go")
    bench = Bench(parser.parse_args())
    bench.run()
    medians = [
        bench.found[name]["dense_seconds"]
        for name in ("evaluate", "compile")
        if "dense_seconds" in bench.found.get(name, {})
    ]
    bench.found["compiled_over_plain"] = statistics.fmean(medians[1:]) / medians[0] if len(medians) > 1 else None
    print(json.dumps(bench.found))


if __name__ == "__main__":
    main()
