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
search's, at the target held out of its training (its run's `predictors.json` names it) as at the others.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench import LOP, PREDICTOR, Bench

from lop.model.samples import Sample

RESULTS = Path(__file__).parent.parent / "results" / "smol"
RATIOS = (0.2, 0.3, 0.4, 0.5)
READ = ("uniform", "magnitude", "wanda", "flap", "owl", "alphapruning")
SEARCHING = ("random", "sensitivity", "evolution")


def parts(items: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Which items [n] are about images, about knowledge, and prose."""
    asked = np.array([not sample.is_prose for sample in items])
    shown = np.array([bool(sample.image) for sample in items])
    return {"images": shown, "knowledge": asked & ~shown, "prose": ~asked}


def summary(bench: Bench, methods: Sequence[str], ratios: Sequence[float]) -> dict[str, Any]:
    """The last line."""
    kinds = parts(bench.items)
    kl: dict[tuple[str, float], np.ndarray] = {}
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
            lines["kl"].setdefault(method, {})[str(ratio)] = float(kl[method, ratio].mean())
            lines["accuracy"].setdefault(method, {})[str(ratio)] = hits
            shares = {part: float(kl[method, ratio][mine].mean()) for part, mine in kinds.items()}
            lines["kl_of"].setdefault(method, {})[str(ratio)] = shares
            print(
                f"{method:<14} {ratio:.0%}  KL {kl[method, ratio].mean():.4f}  right {hits:.1%}  {chosen.tokens} tokens"
            )
    lines |= {"lead": {}, "interval": {}, "significant": {}, "behind": {}}
    for ratio in ratios if LOP in methods else ():
        others = [method for method in methods if method not in (LOP, PREDICTOR)]
        differences = {m: bench.interval(kl[m, ratio] - kl[LOP, ratio]) for m in others}
        base = kl["uniform", ratio].mean()
        lead = differences["uniform"]
        lines["lead"][str(ratio)] = lead.value / base
        lines["interval"][str(ratio)] = [lead.low / base, lead.high / base]
        lines["behind"][str(ratio)] = [m for m, difference in differences.items() if difference.low <= 0]
        lines["significant"][str(ratio)] = not lines["behind"][str(ratio)]
    if {LOP, PREDICTOR} <= set(methods):
        share = {str(ratio): float(kl[PREDICTOR, ratio].mean() / kl[LOP, ratio].mean()) for ratio in ratios}
        lines["predictor_over_search"] = share
    return lines


def main() -> None:
    """Makes what is missing, and prints."""
    parser = argparse.ArgumentParser(description="LOP against every other way to choose widths, on smol.")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    known = [*READ, *SEARCHING, LOP, PREDICTOR]
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
