"""LOP against the systems its paper names: `python benchmarks/company.py`.

On `tiny` and `smol`, at as many parameters, refit for everybody who can be refitted: LLM-Pruner (element- and
vector-wise), Minitron, DarwinLM, Puzzletron, Týr and EfficientLLaVA over FFN neurons, beside uniform widths and LOP's
search, in the paper's order of neurons and the surgeon's; ShortGPT, LLM-Streamline and SliceGPT, which leave the FFNs
as they are; and, where `--methods` names them, other forms of LOP's search (`FORMS`) and Puzzletron over neurons in
other orders (`REORDERED`). Beside these, as it keeps all weights and adds some, DejaVu at as many active neurons. At as
many operations (`lop.model.beyond.flops`, of the language backbone): FastV, SparseVLM and YOPO, by themselves and on
what LOP's search found, against LOP's widths alone that compute as much (between the ratios that were searched its
ratios of layers are interpolated). See `benchmarks/bench.py` and `beyond.py` for what is equal for all.

Each choice and each score is a small file under `results/company/MODEL` (those that `benchmarks/smol.py` has made are
taken from `results/smol`), with the fingerprint of what it was made from; what is missing is made. `--check N` makes N
of each model's scores again, chosen at random, and says whether they agree. `--plot FILE` draws quality by operations.
`--recovery exported` refits layer by layer, as `lop prune` does, where a search scores by one factor a layer.
`--all-items` scores on all test items (4,436 of `smol`), where the 800 that are drawn leave methods level.

The last line is JSON: `methods` with what each needs; by model, method and ratio `kl` (nats, of the dense model's
distributions from the pruned one's: summed over a question's answer, mean over a passage's tokens, mean over items),
`accuracy`, `seconds` (to choose, surveys not counted: those are in `survey_seconds` by model), `flops` as a share of
the dense model's, and `left`, the parameters that whole layers or narrower states leave of the budget (below zero: what
DejaVu has more than the dense model); by model and ratio `lop_ahead` (whether LOP's search is ahead of every other
method by a 95% interval above zero) and `behind`, with the interval of each method's KL less LOP's where it is not, and
the same for LOP's other forms; by model `tokens`, one entry for each way to compute less for images' tokens, share and
ratio of LOP's, with the interval of the KL of LOP alone at as many operations less its own (`seconds`: to set it up).
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench import BLENDED, EXPORTED, LOP, LOPS, PROBED, PUZZLETRON, REFIT, REORDERED, SURGEON, Bench, Exported
from beyond import Beyond, Measured

from lop.checkpoint.recoveries import Recovery
from lop.methods.registry import CONTEXTUAL, DROPPINGS, EVERY, METHODS, RESHAPINGS
from lop.report.intervals import Interval
from lop.run.surveys import SURVEYS

RESULTS = Path(__file__).parent.parent / "results"
MODELS = ("tiny", "smol")
RATIOS = (0.2, 0.3, 0.5)
SHARES = (0.33, 0.5, 0.75)
READ = ("uniform", "llm-pruner", "llm-pruner-vector", "minitron", "darwinlm")
SEARCHING = ("puzzletron", "tyr", "efficientllava")
# LOP in every form that searches or probes.
FORMS = (*LOPS, BLENDED, *PROBED)
_ELSEWHERE = {"smol": [RESULTS / "smol"]}
# By method and ratio.
_Table = Mapping[tuple[str, float], Measured]


def measure(
    beyond: Beyond, methods: Sequence[str], ratios: Sequence[float], recovery: Recovery | Exported = REFIT
) -> _Table:
    """Every method at every ratio."""
    bench, found = beyond.bench, {}
    for method in methods:
        for ratio in ratios:
            if method in RESHAPINGS:
                found[method, ratio] = beyond.reshaped(method, ratio)
            elif method in CONTEXTUAL:
                found[method, ratio] = beyond.contextual(method, ratio)
            else:
                chosen, kl, right = bench.result(method, ratio, recovery)
                found[method, ratio] = Measured(kl, right, beyond.flops(chosen), chosen.seconds)
            one = found[method, ratio]
            print(
                f"{bench.model} {method:<22} {ratio:.0%}  KL {one.kl.mean():.4f}  right {one.right:.1%}  "
                f"{one.seconds:.1f} s  {one.left:,} parameters left",
                flush=True,
            )
    return found


def summary(beyond: Beyond, table: _Table) -> dict[str, Any]:
    """One model's part of the last line, and in words whom LOP is ahead of."""
    found: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    bench, whole = beyond.bench, beyond.flops()
    for (method, ratio), one in table.items():
        values = {"kl": float(one.kl.mean()), "accuracy": one.right, "seconds": one.seconds, "left": one.left}
        for name, value in {**values, "flops": one.flops / whole}.items():
            found[name][method][str(ratio)] = value
    beside = {*FORMS, *CONTEXTUAL}  # LOP itself, and what has more parameters.
    for name, ratio in [key for key in table if key[0] in FORMS]:
        others = {method: one for (method, at), one in table.items() if at == ratio and method not in beside}
        differences = {method: bench.interval(one.kl - table[name, ratio].kl) for method, one in others.items()}
        behind = {method: [each.low, each.high] for method, each in differences.items() if each.low <= 0}
        form = name.removesuffix("-search")
        found[f"{form}_ahead"][str(ratio)] = not behind
        found["behind" if name == LOP else f"{form}_behind"][str(ratio)] = behind
        for method, difference in differences.items():
            print(f"{bench.model} at {ratio:.0%}: {name} is {_in_words(difference)} {method} {_numbers(difference)}")
    made = [kind for kind in SURVEYS if bench.run.survey_file(kind).exists()]
    found["survey_seconds"] = {kind: bench.run.survey_seconds(kind) for kind in made}
    return found


def tokens(beyond: Beyond, ratios: Sequence[float], shares: Sequence[float]) -> list[dict[str, Any]]:
    """Less computed for images' tokens by the dense model and by LOP's, against LOP alone at as many operations."""
    bench = beyond.bench
    known = {ratio: bench.choose(LOP, ratio) for ratio in ratios}
    whole, entries = beyond.flops(), []
    for name in DROPPINGS:
        for share in shares:
            for ratio in (0.0, *ratios):
                one = beyond.dropped(name, share, known.get(ratio))
                entry = {
                    "dropping": name,
                    "share": share,
                    "lop": ratio,
                    "kl": float(one.kl.mean()),
                    "accuracy": one.right,
                    "flops": one.flops / whole,
                    "seconds": one.seconds,
                }
                told = f"{bench.model} {name} {share:.0%} on LOP at {ratio:.0%}  KL {one.kl.mean():.4f}  "
                told += f"{one.flops / whole:.1%} of the operations"
                if (alone := beyond.of_as_many(one.flops, known)) is not None:
                    kl = beyond.dropped(None, 0, alone).kl
                    gain = bench.interval(kl - one.kl)
                    entry |= {"alone": float(kl.mean()), "gain": [gain.value, gain.low, gain.high]}
                    told += f", {_in_words(gain)} LOP alone at {alone.ratio:.1%} {_numbers(gain)}"
                print(told, flush=True)
                entries.append(entry)
    return entries


def plot(beyond: Beyond, table: _Table, dropped: Sequence[Mapping[str, Any]], path: Path) -> None:
    """KL by operations, one line a method."""
    from lop.report.plots import plt, save_figure

    whole, lines = beyond.flops(), defaultdict(list)
    for (method, _), one in table.items():
        lines[_label(method)].append((one.flops / whole, float(one.kl.mean())))
    for entry in dropped:
        way = DROPPINGS[entry["dropping"]].label
        # What takes more from the same widths is one line.
        label = f"{way} alone" if not entry["lop"] else f"{way} on LOP at {entry['lop']:.0%}"
        lines[label].append((entry["flops"], entry["kl"]))
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    for index, (label, points) in enumerate(lines.items()):
        is_lop, drops = label == _label(LOP), any(way.label in label for way in DROPPINGS.values())
        style = {"linewidth": 2.6, "color": "black"} if is_lop else {"color": colours[index % len(colours)]}
        x, y = np.transpose(sorted(points))
        axes.plot(100 * x, y, marker="^" if drops else "o", linestyle=":" if drops else "-", label=label, **style)
    axes.set_yscale("log")
    axes.set(xlabel="operations of the language backbone (% of dense)", ylabel="KL to the dense model (nats)")
    axes.set_title(f"{beyond.bench.model}: what less computing costs")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=7)
    save_figure(figure, path)


def _label(method: str) -> str:
    if method in FORMS or method in REORDERED:
        return "LOP search" if method == LOP else method
    return (CONTEXTUAL[method] if method in CONTEXTUAL else EVERY[method]).label or method


def _needs(method: str) -> list[str]:
    every = {**EVERY, **CONTEXTUAL, **DROPPINGS}
    if method not in FORMS and method not in REORDERED:
        return sorted(every[method].needs)
    # What the order of neurons is made from comes on top.
    key = "importance="
    chosen = (setting.removeprefix(key) for setting in LOPS.get(method, ()) if setting.startswith(key))
    order = REORDERED.get(method) or next(chosen, "")
    made_from = [each.needs for each in METHODS.values() if each.importance == order and each.search is None]
    return sorted(every[PUZZLETRON if method in REORDERED else LOP].needs.union(*made_from))


def _in_words(gain: Interval) -> str:
    return "ahead of" if gain.low > 0 else "behind" if gain.high < 0 else "level with"


def _numbers(gain: Interval) -> str:
    return f"({gain.value:+.4f}, {gain.low:+.4f} to {gain.high:+.4f})"


def main() -> None:
    """Makes what is missing, and prints."""
    usual = [*READ, *RESHAPINGS, *SEARCHING, *CONTEXTUAL, LOP, BLENDED, SURGEON]
    known = [*usual, *REORDERED, *(form for form in FORMS if form not in usual)]
    parser = argparse.ArgumentParser(description="LOP against the systems its paper names, on tiny and smol.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--shares", type=float, nargs="*", default=list(SHARES), help="of images' tokens, to drop")
    parser.add_argument("--methods", nargs="+", default=usual, choices=known)
    parser.add_argument(
        "--recovery", default=REFIT, choices=(REFIT, EXPORTED), help="of widths: one factor a layer, or an export's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all-items", action="store_true", help="score on all test items, where 800 do not tell")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="make N scores of each model again")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="quality by operations; MODEL in it is replaced")
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
            all_items=options.all_items,
        )
        for model in options.models
    ]
    if options.check:
        agree = [ok for bench in benches for ok in bench.check(options.check, options.methods, (options.recovery,))]
        print(json.dumps({"benchmark": "company", "checked": len(agree), "agree": sum(agree)}))
        return
    methods = {name: _needs(name) for name in [*options.methods, *(DROPPINGS if options.shares else ())]}
    line: dict[str, Any] = {"benchmark": "company", "seed": options.seed, "methods": methods}
    for bench in benches:
        beyond = Beyond(bench)
        table = measure(beyond, options.methods, options.ratios, options.recovery)
        dropped = tokens(beyond, options.ratios, options.shares) if options.shares else []
        for name, values in {**summary(beyond, table), "tokens": dropped}.items():
            line.setdefault(name, {})[bench.model] = values
        if options.plot:
            plot(beyond, table, dropped, options.plot.with_name(options.plot.name.replace("MODEL", bench.model)))
    print(json.dumps(line))


if __name__ == "__main__":
    main()
