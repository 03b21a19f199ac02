"""FFNs alone against FFNs and attention against both with whole parts gone, refit for all: `python benchmarks/axes.py`.

At equal parameters, shares of what a model's layers hold in FFNs and attention (embeddings, head and vision tower come
on top), LOP searches with equally many evaluations on `tiny` and `smol`: FFNs alone (`ffn`), groups of attention heads
beside them (`both`), and either of them down to nothing in a layer (`all`). The two latter start from the first one's
answer (`search.start`), and so does a second search of FFNs alone (`again`), without which what comes of searching
twice would count as what attention is worth. The start is confirmed, too, on reward samples kept back; here these are
the greater part, so that the search is short and its answer is judged well. What comes before the trees looks at each
axis alone, on few samples, and so takes twice as long where there are twice as many. `tiny` has one group a layer,
which `both` cannot take: it has no such cells.

`--methods flap-heads llm-pruner-heads` scores other methods that prune attention beside them, with the same recovery:
in the last line as `others`, by how far each is from `all` (as a share of its KL, with the interval).

Each search and each score is a small file under `results/axes/MODEL/KIND`, with the fingerprint of what it was made
from; what is missing is made, and the summary is printed from the files. `--check N` makes N of the scores again.
`--there` prints what there is, and makes nothing.

The last line is JSON: by model, kind and size `kl` (nats, of the dense model's distributions from the pruned one's,
mean over the test items), `joint_over_ffn` (by how much the others are below `ffn`, as a share of it, with its 95%
interval: paired bootstrap over images and texts), what was kept of attention, and `memory_error` and
`latency_error` from the cells of `benchmarks/targets.py`.
"""

import argparse
import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import targets
import torch
from bench import Bench, Chosen

from lop.methods.registry import METHODS
from lop.run.config import Config, find_config, load_config
from lop.run.run import Run
from lop.space.allocation import Space, dense, of_ffns, uniform
from lop.stages.calibrate import calibrate_stage
from lop.storage.files import read_json

RESULTS = Path(__file__).parent.parent / "results"
METHOD = "lop-descent"  # Of those in `bench.LOPS`.
SIZES = (0.9, 0.8, 0.7, 0.6)
KINDS = {
    "ffn": (),
    "again": (),
    "both": ("parts=[ffn, attention]",),
    "all": ("parts=[ffn, attention]", "min_width=0"),
}
_SEARCH = {
    "tiny": (
        "search.evaluations=50",
        "search.simulations=100",
        "search.roots=[wanda, flap, sensitivity]",
        "search.confirm={share: 0.6}",
    ),
    "smol": ("search.evaluations=16", "search.simulations=32", "search.confirm={share: 0.8, candidates: 2}"),
}


class Searches(Bench):
    """A model's searches of one kind.

    Args:
        ffn: those of FFNs alone, from whose answers these start; None if these are they.
    """

    def __init__(self, model: str, kind: str, folder: Path, seed: int, ffn: "Searches | None" = None) -> None:
        self.kind, self._ffn = kind, ffn
        super().__init__(model, folder / model, seed, [RESULTS / "axes" / model / kind])

    def _config(self, ratio: float, *more: str) -> Config:
        settings = [*more, *_SEARCH[self.model], *KINDS[self.kind]]
        if self._ffn is not None:
            settings.append(f"search.start={self._ffn.search_folder(self._start(ratio)).resolve()}")
        return super()._config(ratio, *settings)

    def _start(self, ratio: float) -> float:
        """What the search of FFNs alone was asked for that this one starts from."""
        assert self._ffn is not None
        return self._ffn.ratio(1 - ratio) if self._is_joint else ratio

    def _search(self, name: str, ratio: float) -> Chosen:
        # Where there is its cell alone, the search that this one starts from is made again.
        if self._ffn is not None and not (self._ffn.search_folder(self._start(ratio)) / "search.json").exists():
            self._ffn._search(name, self._start(ratio))
        return super()._search(name, ratio)

    def search_folder(self, ratio: float, name: str = METHOD) -> Path:
        """Of the search at a ratio."""
        return self._folder / self.kind / f"{self.seed}-{ratio}"

    @property
    def _is_joint(self) -> bool:
        return bool(KINDS[self.kind])

    def ratio(self, size: float) -> float:
        """What a search that keeps this share of FFNs and attention together is asked for."""
        if self._is_joint:
            return round(1 - size, 6)
        widths = of_ffns(self._whole, self._whole.budget(round(1 - size, 6)), uniform).widths
        pruned = 1 - sum(widths[: self._whole.layers]) / (self._whole.layers * self._whole.neurons)
        return math.floor(pruned * 1e6) / 1e6  # Targets have six decimals, and must not take a step too many.

    @cached_property
    def _whole(self) -> Space:
        """With attention open."""
        return Run(super()._config(0.5, *KINDS["both"]), self._folder).space

    def cost(self, chosen: Chosen) -> int:
        """Parameters of FFNs and attention."""
        whole = self._whole
        return whole.cost(chosen.widths + dense(whole).widths[len(chosen.widths) :])

    def has(self, size: float) -> bool:
        """Whether both cells of a size are there."""
        return (self._results[0] / f"choice-{METHOD}-{self.ratio(size)}-{self.seed}.json").exists()

    def kept_groups(self, chosen: Chosen) -> float:
        """The share of attention's groups that an answer keeps."""
        groups = chosen.widths[self._whole.layers :]
        return float(np.mean(groups)) / self._whole.parts[1].width if groups else 1.0


def searches(model: str, runs: Path, seed: int) -> dict[str, Searches]:
    """By kind; their statistics are made once, of groups, too."""
    both = Run(load_config(find_config(model), KINDS["both"]), runs / model / "calibration")
    calibrate_stage(both)
    ffn = Searches(model, "ffn", runs, seed)
    others = {kind: Searches(model, kind, runs, seed, ffn) for kind in KINDS if kind != "ffn"}
    able = {kind: bench for kind, bench in others.items() if len(bench.run.space.parts[-1].widths) > 1}
    return {"ffn": ffn, **able}


def summary(
    model: str, found: dict[str, Searches], sizes: Sequence[float], others: Sequence[str], *, there: bool
) -> dict[str, Any]:
    """Of one model."""
    lines: dict[str, Any] = {"kl": {}, "joint_over_ffn": {}, "groups_kept": {}, "others": {}}
    for size in sizes:
        kl: dict[str, np.ndarray] = {}
        for kind, bench in found.items():
            if there and not bench.has(size):
                continue
            chosen, kl[kind], right = bench.result(METHOD, bench.ratio(size))
            lines["kl"].setdefault(kind, {})[str(size)] = float(kl[kind].mean())
            lines["groups_kept"].setdefault(kind, {})[str(size)] = bench.kept_groups(chosen)
            kept = f"{bench.cost(chosen):,} parameters, {bench.kept_groups(chosen):.0%} of attention"
            print(f"{model:<5} {size:.0%} {kind:<5} KL {kl[kind].mean():.4f}  right {right:.1%}  {kept}")
        for kind in [kind for kind in kl if kind != "ffn"]:
            lead, base = found["ffn"].interval(kl["ffn"] - kl[kind]), kl["ffn"].mean()
            values = {"lead": lead.value / base, "interval": [lead.low / base, lead.high / base]}
            lines["joint_over_ffn"].setdefault(str(size), {})[kind] = values
        if "all" in kl:
            lines["others"][str(size)] = {name: _beside(found["all"], name, size, kl["all"]) for name in others}
    return lines


def _beside(bench: Searches, name: str, size: float, ours: np.ndarray) -> dict[str, Any]:
    """How another method that prunes attention does at a size, beside what LOP found there."""
    chosen, theirs, right = bench.result(name, bench.ratio(size))
    kept = f"{bench.cost(chosen):,} parameters, {bench.kept_groups(chosen):.0%} of attention"
    print(f"{bench.model:<5} {size:.0%} {name} KL {theirs.mean():.4f}  right {right:.1%}  {kept}")
    behind, base = bench.interval(theirs - ours), ours.mean()
    interval = [behind.low / base, behind.high / base]
    return {"kl": float(theirs.mean()), "behind": behind.value / base, "interval": interval}


def targets_errors() -> dict[str, Any]:
    """What the cells of `benchmarks/targets.py` that are there say of predictions."""
    cells = [
        {"name": path.stem.removeprefix("memory-"), **read_json(path)}
        for path in sorted(targets.RESULTS.glob("memory-*.json"))
    ]
    errors: dict[str, Any] = {"memory_error": targets.memory_errors(cells)["memory_error"] if cells else None}
    profile = targets.RESULTS / "latency-smol.json"
    errors["latency_error"] = targets.latency_errors(read_json(profile))["latency_error"] if profile.exists() else None
    return errors


def main() -> None:
    """Makes what is missing, and prints."""
    parser = argparse.ArgumentParser(description="FFNs alone against attention and whole parts beside them.")
    parser.add_argument("--models", nargs="+", default=["tiny", "smol"], choices=list(_SEARCH))
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=[], choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--there", action="store_true", help="print what is there, and make nothing")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="make N scores of each kind again")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-axes"), help="where searches are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {model: searches(model, options.runs, options.seed) for model in options.models}
    if options.check:
        benches = [bench for kinds in found.values() for bench in kinds.values()]
        agree = [same for bench in benches for same in bench.check(options.check, [METHOD])]
        print(json.dumps({"benchmark": "axes", "checked": len(agree), "agree": sum(agree)}))
        return
    lines = {
        model: summary(model, kinds, options.sizes, options.methods, there=options.there)
        for model, kinds in found.items()
    }
    print(json.dumps({"benchmark": "axes", "seed": options.seed, **lines, **targets_errors()}))


if __name__ == "__main__":
    main()
