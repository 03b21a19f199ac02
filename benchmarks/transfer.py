"""Allocations for models that were never searched: `PYTHONPATH=. python benchmarks/transfer.py`.

Each model of the zoo (`training/zoo`), `tiny` and `smol` is left out in turn, and the predictor learns from the others.
What its allocations cost with 0, 10 and 30 evaluations on the model that was left out is held against uniform, the
published allocations, the additive programme over all measured layers, and the model's own search of 200 evaluations a
target (`python -m training.zoo.make --search`; `smol`: `lop-200` of `benchmarks/bench.py`). Widths alone are compared:
everybody has the same order of neurons and the same refit (`smol`'s published methods: their own order). KL in nats on
test samples.

Scores are kept under `results/transfer`, one file a model; what is missing is measured, for which `--work` must hold
the zoo's weights (`python -m training.zoo.make`). `--check N` measures N scores again, of models that are at hand.

The last line is JSON: geometric means over models and targets of KL ratios (`zero_over_best_published`: to the best of
uniform, FLAP, OWL and AlphaPruning in each case; `thirty_over_search`; `smol_zero_over_uniform` and
`smol_thirty_over_search` of that model alone), `tau` (Kendall, between predicted and measured damages of models left
out), `inside` (the share of measured damages in the 90% intervals) and `milliseconds` (an allocation at 28 layers with
features at hand).
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import LOP, Bench, Chosen

from lop.model.find import EMBEDDED
from lop.predictor.curves import PLAIN, Curves, rising
from lop.predictor.general import General, load_general
from lop.predictor.general_training import Measured, leave_one_out
from lop.predictor.probing import Probe, probe_for
from lop.run.config import find_config, load_config
from lop.search.racing import unpack_values
from lop.space.allocation import Allocation, Space, uniform
from lop.space.features import Features
from lop.storage.files import read_json
from lop.storage.fingerprint import fingerprint
from training.zoo.data import load_members, load_searches
from training.zoo.fit import RULE, agreement
from training.zoo.measure import PUBLISHED, TARGETS
from training.zoo.members import MEMBERS
from training.zoo.scores import MAX_RATIO, RESULTS, Scores

COUNTS = (0, 10, 30)
SMOL = RESULTS.parent / "smol"
SMOL_SPACE = Space(30, 1536, 32, MAX_RATIO)


def costs(scores: Scores, member: Measured, general: General, counts: Sequence[int]) -> dict[str, dict[float, float]]:
    """The KL on test samples by method and target."""
    searched = load_searches(member.name)
    measured = Curves(rising(np.log(member.damages.clip(1e-6))), np.zeros_like(member.damages))
    found: dict[str, dict[float, float]] = {}
    for target in TARGETS:
        budget = scores.space.budget(target)
        chosen = {"uniform": uniform(scores.space, budget)}
        chosen |= {method: scores.published(method, target) for method in PUBLISHED}
        chosen["programme"] = measured.allocate(scores.space, budget, PLAIN)
        for count in counts:
            chosen[f"{count} probes"] = probed(scores, general, member.features, budget, count)
        if target in searched:
            chosen["search"] = searched[target][0]
        for method, allocation in chosen.items():
            found.setdefault(method, {})[target] = scores.test(allocation)
    return found


def probed(scores: Scores, general: General, features: Features, budget: int, count: int) -> Allocation:
    """What so many evaluations on the reward samples come to, as `lop probe --target` spends them."""
    space = scores.space

    def allocate(probes: Sequence[Probe]) -> Allocation:
        return general.answering(features, probes)(space, budget)

    if not count:
        return allocate(())
    curves, step = general.curves(features), load_config(find_config(EMBEDDED)).search.step
    return probe_for(space, curves, budget, count, allocate, scores.reward, scores.evaluation, size=step, seed=0)[1]


def smol_costs(runs: Path | None, general: General, counts: Sequence[int]) -> dict[str, dict[float, float]]:
    """`smol`'s, from what `benchmarks/smol.py` has scored, and what is chosen with so many probes on the same items.

    Args:
        runs: its statistics; what is missing is not measured without.
    """
    (member,) = load_members(["smol"])
    bench = None if runs is None else Bench("smol", runs, 0, [RESULTS, SMOL])
    probing = {f"{count} probes": f"lop-probes-{count}" for count in counts if count}
    names = {
        "uniform": "uniform",
        **{name: name for name in PUBLISHED},
        "programme": "sensitivity",
        **probing,
        "search": "lop-200",
        "short search": LOP,
    }
    found: dict[str, dict[float, float]] = {}
    for target in TARGETS:
        widths = general.answering(member.features)(SMOL_SPACE, SMOL_SPACE.budget(target)).widths
        chosen = {"0 probes": Chosen("general", target, widths, "activation", 0, 0.0)}
        for method, name in names.items():
            if path := _kept(f"choice-{name}-{target}-0.json"):
                choice = {key: value for key, value in read_json(path).items() if key != "made_from"}
                chosen[method] = Chosen(**{**choice, "widths": tuple(choice["widths"])})
            elif bench is not None and method in probing:
                chosen[method] = bench.choose(name, target)
        for method, choice in chosen.items():
            if bench is not None:
                bench.scored(choice)
            if path := _kept(f"score-{fingerprint([choice.importance, choice.widths])}.json"):
                kl = float(unpack_values(read_json(path)["divergence"]).mean())
                found.setdefault(method, {})[target] = kl
    return found


def _kept(name: str) -> Path | None:
    """The cell of that name, if there is one."""
    return next((folder / name for folder in (RESULTS, SMOL) if (folder / name).exists()), None)


def milliseconds(general: General) -> float:
    """The median time of an allocation of 28 layers of 18,944 neurons, with features at hand."""
    (member,) = load_members([EMBEDDED])
    chosen = np.arange(28) * 12 // 28
    features = Features(member.features.curves[:, chosen], member.features.scalars[chosen])
    space, times = Space(28, 18944, 128, MAX_RATIO), []
    for target in np.linspace(0.1, 0.7, 101):
        start = time.perf_counter()
        general.answering(features)(space, space.budget(float(target)))
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def mean_ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The geometric mean of the ratios."""
    return float(np.exp(np.mean([np.log(a / b) for a, b in pairs]))) if pairs else None


def summary(work: Path | None, smol_runs: Path | None, kind: str, counts: Sequence[int]) -> dict[str, Any]:
    """Makes what is missing, prints it, and returns the last line."""
    everybody = load_members()
    left_out = leave_one_out(kind, everybody, rule=RULE)
    members = [member for member in everybody if member.is_measured]
    best, over_search, over_programme, agreements = [], [], [], []
    by_probes: dict[str, list[tuple[float, float]]] = {f"{count} probes": [] for count in counts}
    for member in members:
        general = left_out[member.name]
        agreements.append(agreement(general.curves(member.features), member))
        print(f"{member.name:<9}", " ".join(f"{key} {value:.3f}" for key, value in agreements[-1].items()))
        found = costs(Scores(member.name, work), member, general, counts)
        for method, row in found.items():
            print(f"{member.name:<9} {method:<13}", " ".join(f"{t:.0%} {kl:.4f} " for t, kl in row.items()), flush=True)
        for target in TARGETS:
            zero = found["0 probes"][target]
            best.append((zero, min(found[method][target] for method in ("uniform", *PUBLISHED))))
            over_programme.append((zero, found["programme"][target]))
            for name, pairs in by_probes.items():
                pairs.append((found[name][target], found["uniform"][target]))
            if "30 probes" in found and target in found.get("search", {}):
                over_search.append((found["30 probes"][target], found["search"][target]))
    smol = smol_costs(smol_runs, left_out["smol"], counts)
    for method, row in smol.items():
        print(f"{'smol':<9} {method:<13}", " ".join(f"{t:.0%} {kl:.4f} " for t, kl in row.items()))
    pairs = [(kl, smol["search"][t]) for t, kl in smol.get("30 probes", {}).items() if t in smol.get("search", {})]
    zero = {t: kl for t, kl in smol.get("0 probes", {}).items() if t in smol.get("uniform", {})}
    best += [(kl, min(smol[m][t] for m in ("uniform", *PUBLISHED) if t in smol[m])) for t, kl in zero.items()]
    over_programme += [(kl, smol["programme"][t]) for t, kl in zero.items() if t in smol.get("programme", {})]
    for name, known in by_probes.items():
        known += [(kl, smol["uniform"][t]) for t, kl in smol.get(name, {}).items() if t in smol.get("uniform", {})]
    means = {key: float(np.mean([found[key] for found in agreements])) for key in ("tau", "inside")}
    return {
        "benchmark": "transfer",
        "kind": kind,
        "models": [member.name for member in members],
        "zero_over_best_published": mean_ratio(best),
        "smol_zero_over_uniform": mean_ratio([(kl, smol["uniform"][t]) for t, kl in zero.items()]),
        "thirty_over_search": mean_ratio([*over_search, *pairs]),
        "smol_thirty_over_search": mean_ratio(pairs),
        "zero_over_programme": mean_ratio(over_programme),
        "over_uniform": {name: mean_ratio(pairs) for name, pairs in by_probes.items()},
        **means,
        "milliseconds": milliseconds(left_out[EMBEDDED]),
    }


def check(work: Path | None, count: int) -> dict[str, Any]:
    """Measures some of the scores again."""
    names = [EMBEDDED, *(name for name in MEMBERS if work and (work / name / "config.json").exists())]
    tables = [Scores(name, work) for name in names]
    keys = [(scores, key) for scores in tables for key in scores.known if key.startswith("test ")]
    agree = 0
    for index in np.random.default_rng().permutation(len(keys))[:count]:
        scores, key = keys[index]
        again = scores.lab.test(Allocation(tuple(map(int, key.split()[1:]))))
        print(f"{scores.name} {key}: {scores.known[key]}, again {again:.5g}")
        agree += bool(np.isclose(again, scores.known[key], rtol=0.02, atol=1e-5))
    return {"benchmark": "transfer", "checked": min(count, len(keys)), "agree": agree}


def main() -> None:
    """Makes what is missing, and prints."""
    parser = argparse.ArgumentParser(description="Allocations for models that were never searched.")
    parser.add_argument("--work", type=Path, help="the folder of the zoo's weights")
    parser.add_argument("--smol-runs", type=Path, help="the folder of smol's statistics, to score what is missing")
    parser.add_argument("--kind", default=load_general().kind, help="of predictor")
    parser.add_argument(
        "--probes", type=int, nargs="+", default=COUNTS, metavar="N", help="0, and how many else (10 30)"
    )
    parser.add_argument("--check", type=int, default=0, metavar="N", help="measure N scores again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.check:
        found = check(options.work, options.check)
    else:
        found = summary(options.work, options.smol_runs, options.kind, sorted({0, *options.probes}))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
