"""LOP against the systems its paper names that prune FFN neurons, refit for everybody: `python benchmarks/company.py`.

On `tiny` and `smol`: LLM-Pruner (element- and vector-wise), Minitron, DarwinLM, Puzzletron, Týr and EfficientLLaVA,
beside uniform widths and LOP's search; see `benchmarks/bench.py` for what is equal for all. Each choice and each score
is a small file under `results/company/MODEL` (those that `benchmarks/smol.py` has made are taken from `results/smol`),
with the fingerprint of what it was made from; what is missing is made. `--check N` makes N of each model's scores
again, chosen at random, and says whether they agree.

The last line is JSON: `methods` with what each needs; by model, method and ratio `kl` (nats, of the dense model's
distributions from the pruned one's: summed over a question's answer, mean over a passage's tokens, mean over items),
`accuracy` and `seconds` (to choose the widths, surveys not counted: those are in `survey_seconds` by model); by model
and ratio `lop_ahead` (whether LOP's search is ahead of every other method by a 95% interval above zero) and `behind`,
with the interval of each method's KL less LOP's where it is not.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench import LOP, LOPS, Bench

from lop.methods.registry import METHODS
from lop.run.surveys import SURVEYS

RESULTS = Path(__file__).parent.parent / "results"
MODELS = ("tiny", "smol")
RATIOS = (0.2, 0.3, 0.5)
READ = ("uniform", "llm-pruner", "llm-pruner-vector", "minitron", "darwinlm")
SEARCHING = ("puzzletron", "tyr", "efficientllava")
_ELSEWHERE = {"smol": [RESULTS / "smol"]}


def summary(bench: Bench, methods: Sequence[str], ratios: Sequence[float]) -> dict[str, Any]:
    """One model's part of the last line."""
    kl: dict[tuple[str, float], np.ndarray] = {}
    found: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    for method in methods:
        for ratio in ratios:
            chosen, kl[method, ratio], hits = bench.result(method, ratio)
            found["kl"][method][str(ratio)] = float(kl[method, ratio].mean())
            found["accuracy"][method][str(ratio)] = hits
            found["seconds"][method][str(ratio)] = chosen.seconds
            print(
                f"{bench.model} {method:<18} {ratio:.0%}  KL {kl[method, ratio].mean():.4f}  right {hits:.1%}  "
                f"{chosen.tokens} tokens  {chosen.seconds:.1f} s"
            )
    for ratio in ratios if LOP in methods else ():
        differences = {m: bench.interval(kl[m, ratio] - kl[LOP, ratio]) for m in methods if m != LOP}
        behind = {m: [each.low, each.high] for m, each in differences.items() if each.low <= 0}
        found["lop_ahead"][str(ratio)] = not behind
        found["behind"][str(ratio)] = behind
        for method, difference in differences.items():
            word = "ahead of" if difference.low > 0 else "behind" if difference.high < 0 else "level with"
            print(
                f"{bench.model} at {ratio:.0%}: LOP is {word} {method} "
                f"({difference.value:+.4f}, {difference.low:+.4f} to {difference.high:+.4f})"
            )
    made = [kind for kind in SURVEYS if bench.run.survey_file(kind).exists()]
    found["survey_seconds"] = {kind: bench.run.survey_seconds(kind) for kind in made}
    return found


def main() -> None:
    """Makes what is missing, and prints."""
    known = [*READ, *SEARCHING, *LOPS]
    parser = argparse.ArgumentParser(description="LOP against the systems its paper names, on tiny and smol.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--methods", nargs="+", default=known, choices=known)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=int, default=0, metavar="N", help="make N scores of each model again")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/benchmark-company"), help="where searches and surveys are kept"
    )
    options = parser.parse_args()
    benches = [
        Bench(
            model,
            options.runs / model,
            options.seed,
            [RESULTS / "company" / model, *_ELSEWHERE.get(model, [])],
        )
        for model in options.models
    ]
    if options.check:
        agree = [ok for bench in benches for ok in bench.check(options.check, options.methods)]
        print(json.dumps({"benchmark": "company", "checked": len(agree), "agree": sum(agree)}))
        return
    methods = {name: sorted(METHODS[LOP if name in LOPS else name].needs) for name in options.methods}
    line: dict[str, Any] = {"benchmark": "company", "seed": options.seed, "methods": methods}
    for bench in benches:
        for name, values in summary(bench, options.methods, options.ratios).items():
            line.setdefault(name, {})[bench.model] = values
    print(json.dumps(line))


if __name__ == "__main__":
    main()
