"""What distillation brings back after pruning on `smol`: `python benchmarks/smaller_distil.py`.

Each training is a small file under `results/smaller`, with the fingerprint of what it was made from. What is missing
is made: on one core to itself some 5 ms a token of training, looks at the reward samples included; before the first
one 20 minutes for statistics, test items and what the teacher says, 4 for each refit.
Then the summary is printed from the files.

Widths are those of `benchmarks/smol.py`. A pruned checkpoint is exported with `refit` and learns as `lop distil` has
it learn, with config `smol`, from its calibration samples and from those of `training/smol/lessons.py`, ten times as
many, which are made at first: `--samples calibration` leaves them out, `all` takes all prose that there is, and `own`
adds two million tokens that the dense model writes itself (`training/smol/own.py`). `own` is a GPU's work: 3 million
tokens are read, in larger steps. Nothing differs between methods but the widths. KL to the dense model is measured
before and after, on 300 of that benchmark's test items (the first that its seed draws), as there.

Without options `more` and `own` are printed. The last line is JSON: by what was learnt from and how many tokens were
read, then by method and ratio: `distilled_back`, the share of the KL to dense that training brings back; its 95%
`interval` (paired bootstrap over images and texts); `kl` before and after; and `curve`, on the way: pairs of tokens
read and KL on 256 reward samples.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from bench import LOP, Bench, Chosen
from cells import cell

from lop.cli import set_up_logging
from lop.distil.training import Judge
from lop.model.adapter import QwenVL, load_model
from lop.model.encoding import encode
from lop.model.samples import Sample, fingerprint_samples
from lop.report.intervals import Interval, keyed_bootstrap
from lop.run.config import Config, find_config, load_config
from lop.search.racing import pack_values, unpack_values
from lop.search.scoring import Scoring
from lop.space.allocation import Allocation
from lop.stages.distil import distil_stage
from lop.stages.prune import export_allocation
from lop.storage.fingerprint import fingerprint

RESULTS = Path(__file__).parent.parent / "results" / "smaller"
METHODS = (LOP, "uniform")
RATIOS = (0.3, 0.5)
ITEMS = 300
CALIBRATION, MORE, ALL, OWN = SAMPLES = ("calibration", "more", "all", "own")
TOKENS = {CALIBRATION: 200_000, MORE: 200_000, ALL: 200_000, OWN: 3_000_000}
_ON_GPU = (
    "batch_tokens=16384", "distil.batch_tokens=16384", "distil.learning_rate=0.0003", "distil.every=15",
    "distil.patience=50",
)  # fmt: skip
_OWN_PARTS, _OWN_TOKENS = 2, 1_000_000  # Each part has a seed of its own: they can be written side by side.
_EVERY = 1_000_000  # Passages; there are fewer.


class Distilling:
    """The students, and what they are judged by, each made when it is first needed.

    Args:
        bench: of `benchmarks/smol.py`, for widths, statistics and test items.
        folder: of pruned checkpoints and of what the teacher says.
        samples: of `SAMPLES`, what students learn from.
        settings: on top of config `smol`.
    """

    def __init__(self, bench: Bench, folder: Path, samples: str, settings: Sequence[str]) -> None:
        self.bench = bench
        self._folder, self._samples = folder, samples
        self.config: Config = load_config(find_config("smol"), ["workers=0", *settings])

    @cached_property
    def items(self) -> list[Sample]:
        """The test items."""
        test = self.bench.run.samples.test
        return [test[index] for index in sorted(np.random.default_rng(0).permutation(len(test))[:ITEMS])]

    @cached_property
    def lessons(self) -> list[Path]:
        """Folders of samples that students learn from besides the calibration samples."""
        if self._samples == CALIBRATION:
            return []
        # Where they are needed: their sources are other packages than LOP's.
        folder = self._folder / ("lessons" if self._samples == MORE else "lessons-all")
        if not (folder / "calibration.parquet").exists():
            from training.smol.lessons import PASSAGES, write_lessons

            write_lessons(folder, PASSAGES if self._samples == MORE else _EVERY)
        own = [self._folder / f"own-{part}" for part in range(_OWN_PARTS if self._samples == OWN else 0)]
        for seed, part in enumerate(own):
            if not (part / "calibration.parquet").exists():
                from training.smol.own import write_own

                write_own(part, _OWN_TOKENS, seed=seed)
        return [folder, *own]

    @cached_property
    def judge(self) -> Judge:
        """The test items with what the dense model says to them."""
        dense = self._load(self.bench.run.model_folder)
        encoded = encode(dense, self.items, batch_tokens=self.config.batch_tokens)
        return Judge(encoded, Scoring(dense.lean_backbone(), encoded).all_tails())

    def train(self, chosen: Chosen) -> dict[str, Any]:
        """Exports an allocation, has it learn, and measures it before and after."""
        start = self._folder / f"refit-{fingerprint([chosen.importance, chosen.widths])}"
        assert chosen.importance == self.bench.run.config.importance  # The order of the run's neurons is the method's.
        if not start.exists():
            export_allocation(self.bench.run, Allocation(chosen.widths), start, target=chosen.ratio, recovery="refit")
        end = start.with_name(start.name.replace("refit", "distil"))
        shutil.rmtree(end, ignore_errors=True)
        began = time.perf_counter()
        manifest = distil_stage(self.config, start, end, folders=self.lessons, work=self._folder / "work")
        seconds = time.perf_counter() - began
        before, after = (pack_values(self.judge.divergences(self._load(place))) for place in (start, end))
        return {"before": before, "after": after, "seconds": seconds, "distilled": manifest["distilled"][-1]}

    def _load(self, place: Path) -> QwenVL:
        return load_model(place, device=self.config.device, dtype=self.config.dtype)

    def cell(self, method: str, ratio: float) -> dict[str, Any]:
        """A method's training at a ratio."""
        chosen = self.bench.choose(method, ratio)
        settings = self.config.distil.model_dump(mode="json")
        made_from = fingerprint([self.bench.made_from, chosen.widths, settings, fingerprint_samples(self.items)])
        return cell(RESULTS / f"distil-{method}-{ratio}-{self.kind}.json", made_from, lambda: self.train(chosen))

    @property
    def kind(self) -> str:
        """What the names of trainings end in that differ in widths alone."""
        return f"{self._samples}-{self.config.distil.tokens}-{self.config.seed}"


def summary(
    each: Sequence[Distilling] | None = None, methods: Sequence[str] = METHODS, ratios: Sequence[float] = RATIOS
) -> dict[str, Any]:
    """Makes the cells that are missing, prints tables, and returns the last line."""
    lines: dict[str, Any] = {"benchmark": "smaller_distil", "items": ITEMS}
    for distilling in each or [make(MORE), make(OWN)]:
        print(f"-- {distilling.kind}")
        for name, values in _table(distilling, methods, ratios).items():
            lines.setdefault(name, {})[distilling.kind] = values
    return lines


def _table(distilling: Distilling, methods: Sequence[str], ratios: Sequence[float]) -> dict[str, Any]:
    """By what is measured, method and ratio."""
    keys = [sample.keys[0] for sample in distilling.items]

    def interval(values: np.ndarray) -> Interval:
        return keyed_bootstrap(values, keys)

    lines: dict[str, Any] = {}
    for ratio in ratios:
        for method in methods:
            found = distilling.cell(method, ratio)
            before, after = (unpack_values(found[name]) for name in ("before", "after"))
            back, whole = interval(before - after), before.mean()
            shares = [float(value / whole) for value in (back.value, back.low, back.high)]
            values = {
                "distilled_back": shares[0],
                "interval": shares[1:],
                "kl": {"before": float(whole), "after": float(after.mean())},
                "curve": found["distilled"]["curve"],
            }
            for name, value in values.items():
                lines.setdefault(name, {}).setdefault(method, {})[str(ratio)] = value
            back_text = f"{shares[0]:.1%} ({shares[1]:.1%} to {shares[2]:.1%})"
            spent = f"{found['distilled']['tokens']:,} tokens, {found['seconds']:.0f} s"
            print(f"{method:<12} {ratio:.0%}  KL {whole:.4f} → {after.mean():.4f}  back {back_text}  {spent}")
    return lines


def check(count: int, distilling: Distilling | None = None) -> tuple[int, int]:
    """Makes `count` of the trainings again, chosen at random; how many were checked, and how many agree."""
    distilling = distilling or make(MORE)
    names = [path.stem for path in sorted(RESULTS.glob(f"distil-*-{distilling.kind}.json"))]
    agree = checked = 0
    for index in np.random.default_rng().permutation(len(names))[:count]:
        method, ratio = names[index].removeprefix("distil-").removesuffix(f"-{distilling.kind}").rsplit("-", 1)
        chosen = distilling.bench.choose(method, float(ratio))
        known, again = distilling.cell(method, float(ratio)), distilling.train(chosen)
        values = [unpack_values(found["after"]).mean() for found in (known, again)]
        print(f"{method} at {float(ratio):.0%}: KL {values[0]:.4f}, again {values[1]:.4f}")
        checked += 1
        agree += bool(np.isclose(*values, rtol=0.02))
    return checked, agree


def make(
    samples: str,
    *,
    tokens: int | None = None,
    seed: int = 0,
    runs: Path = Path("runs"),
    settings: Sequence[str] = (),
) -> Distilling:
    """What trainings on such samples need; nothing of it is computed yet but the statistics."""
    bench = Bench("smol", runs / "benchmark-smol", seed, [RESULTS.parent / "smol"])
    settings = [*(_ON_GPU if samples == OWN else ()), *settings]
    changed = [f"distil.tokens={tokens or TOKENS[samples]}", f"seed={seed}", *settings]
    return Distilling(bench, runs / "benchmark-smaller", samples, changed)


def main() -> None:
    """Makes what is missing, and prints."""
    parser = argparse.ArgumentParser(description="What distillation brings back after pruning, on smol.")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--tokens", type=int, help="read in training (default: 200,000, of own samples 3 million)")
    parser.add_argument("--samples", choices=SAMPLES, nargs="+", default=[MORE, OWN], help="what is learnt from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=int, default=0, metavar="N", help="make N trainings on the first again")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where checkpoints and notes are kept")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    options = parser.parse_args()
    set_up_logging()
    each = [
        make(samples, tokens=options.tokens, seed=options.seed, runs=options.runs, settings=options.set)
        for samples in options.samples
    ]
    if options.check:
        checked, agree = check(options.check, each[0])
        print(json.dumps({"benchmark": "smaller_distil", "checked": checked, "agree": agree}))
        return
    print(json.dumps(summary(each, options.methods, options.ratios)))


if __name__ == "__main__":
    main()
