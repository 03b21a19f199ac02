"""LOP against every other way to choose widths, on `smol`, refit for everybody: `python benchmarks/smol.py`.

Each search and each score is a small file under `results/smol`, with the fingerprints of what it was made from. What is
missing is made, which takes hours on two cores; then the summary is printed from the files. `--check N` makes N of the
scores again, chosen at random, and says whether they agree. `--only search 0.3` makes one part, so that several
processes can share the work.

Every searching method may score as many reward tokens as LOP's search did at that target. All allocations are scored on
the same test items, drawn once by a fixed seed, with the refit that one factor a layer gives every width
(`lop.model.repair`), in the method's own order of neurons.

The last line is JSON: by method and ratio `kl` (nats, of the dense model's distributions from the pruned one's: summed
over a question's answer, mean over a passage's tokens, mean over items), `kl_of` images, knowledge and prose, and
`accuracy`; by ratio `lead` (of LOP's search over uniform, as a share of uniform's KL), its 95% `interval` (paired
bootstrap over images and texts) and `significant`: whether LOP is ahead of every other method by an interval that lies
above zero; `behind` names those where it is not; `tokens_saved`, how many times as many reward tokens it would have
scored without races (where its cell knows); `predictor_over_search` is the predictor's KL as a share of the
search's, at the target held out of its training (its run's `predictors.json` names it) as at the others. `blended` has
the same of LOP's searches at six targets that share what they have found, and of the predictor that learns from these;
`general` of searches that also start from what the general predictor says, as those of config `smol` do.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench import BLENDED, BLENDED_PREDICTOR, LOP, LOP_GENERAL, PREDICTOR, Bench

from lop.model.samples import Sample

RESULTS = Path(__file__).parent.parent / "results" / "smol"
RATIOS = (0.2, 0.3, 0.4, 0.5)
READ = ("uniform", "magnitude", "wanda", "flap", "owl", "alphapruning")
SEARCHING = ("random", "sensitivity", "evolution")
OURS = (LOP, PREDICTOR, BLENDED, BLENDED_PREDICTOR, LOP_GENERAL)
# What the last line calls what it says of LOP's other searches.
NAMES = {BLENDED: "blended", LOP_GENERAL: "general"}
# Of each item, by method and ratio.
_Kl = dict[tuple[str, float], np.ndarray]


def parts(items: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Which items [n] are about images, about knowledge, and prose."""
    asked = np.array([not sample.is_prose for sample in items])
    shown = np.array([bool(sample.image) for sample in items])
    return {"images": shown, "knowledge": asked & ~shown, "prose": ~asked}


def summary(bench: Bench, methods: Sequence[str], ratios: Sequence[float]) -> dict[str, Any]:
    """The last line."""
    kinds = parts(bench.items)
    kl: _Kl = {}
    lines: dict[str, Any] = {
        "benchmark": "smol",
        "seed": bench.seed,
        "items": len(bench.items),
        "kl": {},
        "kl_of": {},
        "accuracy": {},
        "tokens_saved": {},
    }
    for method in methods:
        for ratio in ratios:
            chosen, kl[method, ratio], hits = bench.result(method, ratio)
            if method == LOP and chosen.unraced:
                lines["tokens_saved"][str(ratio)] = chosen.unraced / chosen.tokens
            if method in NAMES:
                lines.setdefault(NAMES[method], {}).setdefault("tokens", {})[str(ratio)] = chosen.tokens
            lines["kl"].setdefault(method, {})[str(ratio)] = float(kl[method, ratio].mean())
            lines["accuracy"].setdefault(method, {})[str(ratio)] = hits
            shares = {part: float(kl[method, ratio][mine].mean()) for part, mine in kinds.items()}
            lines["kl_of"].setdefault(method, {})[str(ratio)] = shares
            print(
                f"{method:<14} {ratio:.0%}  KL {kl[method, ratio].mean():.4f}  right {hits:.1%}  {chosen.tokens} tokens"
            )
    for search, predictor in ((LOP, PREDICTOR), (BLENDED, BLENDED_PREDICTOR), (LOP_GENERAL, None)):
        of_search = lines[NAMES[search]] if search in NAMES and search in methods else lines
        if search in methods:
            of_search |= _leads(bench, kl, [method for method in methods if method not in OURS], ratios, search)
        if {search, predictor} <= set(methods):
            share = {str(ratio): float(kl[predictor, ratio].mean() / kl[search, ratio].mean()) for ratio in ratios}
            of_search["predictor_over_search"] = share
    return lines


def _leads(
    bench: Bench, kl: _Kl, others: Sequence[str], ratios: Sequence[float], search: str
) -> dict[str, dict[str, Any]]:
    """How far a search is ahead of others at each ratio."""
    found: dict[str, dict[str, Any]] = {"lead": {}, "interval": {}, "significant": {}, "behind": {}}
    for ratio in ratios:
        differences = {m: bench.interval(kl[m, ratio] - kl[search, ratio]) for m in others}
        base, lead = kl["uniform", ratio].mean(), differences["uniform"]
        found["lead"][str(ratio)] = lead.value / base
        found["interval"][str(ratio)] = [lead.low / base, lead.high / base]
        found["behind"][str(ratio)] = [m for m, difference in differences.items() if difference.low <= 0]
        found["significant"][str(ratio)] = not found["behind"][str(ratio)]
    return found


def main() -> None:
    """Makes what is missing, and prints."""
    parser = argparse.ArgumentParser(description="LOP against every other way to choose widths, on smol.")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    known = [*READ, *SEARCHING, *OURS]
    parser.add_argument("--methods", nargs="+", default=known, choices=known)
    parser.add_argument("--only", choices=("search", "scores"), help="make this part alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=int, default=0, metavar="N", help="make N scores again")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/benchmark-smol"), help="where searches keep their ledgers"
    )
    options = parser.parse_args()
    bench = Bench("smol", options.runs, options.seed, [RESULTS])
    if options.check:
        agree = list(bench.check(options.check, options.methods))
        print(json.dumps({"benchmark": "smol", "checked": len(agree), "agree": sum(agree)}))
        return
    if options.only == "search":
        for ratio in options.ratios:
            for method in options.methods:
                bench.choose(method, ratio)
        return
    print(json.dumps(summary(bench, options.methods, options.ratios)))


if __name__ == "__main__":
    main()
