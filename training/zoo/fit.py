"""Trains the general predictor in all its kinds, compares them on models left out, and writes the one that ships.

    python -m training.zoo.fit [--work WORK] [--workers N] [--kind KIND]

Each kind with each of its strengths (of what keeps weights small) is a trial of Ray Tune, or, with `--workers 0`, of
this process: it learns from all models but one, each left out in turn. What its allocations cost on the model left out
decides, as it does among a run's own predictors in `lop train`: KL on the reward samples by uniform's, in the geometric
mean over models and targets. What was not measured yet is, with the zoo's weights in WORK (`training.zoo.make`).
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lop.model.find import EMBEDDED
from lop.predictor.curves import Curves, Rule
from lop.predictor.general_training import FITS, Measured, fit_general, leave_one_out
from lop.run.compute import Compute
from lop.run.config import Config, find_config, load_config
from lop.space.allocation import Allocation, uniform
from lop.storage.location import Location
from training.zoo.data import load_members
from training.zoo.make import compute_with
from training.zoo.measure import TARGETS
from training.zoo.scores import Scores, space_of

OUT = Path("lop/assets/general/predictor.safetensors")
RULE = Rule(power=1.0, cap=0.3)
# To choose among; without one, the kind's own.
STRENGTHS: Mapping[str, Sequence[float | None]] = {
    "second-order": (None,),
    "ridge": (None,),  # Leaves out its members itself, to find it.
    "attention": (0.03, 0.1, 0.3),
    "direct": (0.3, 1.0, 3.0),
}
Asked = tuple[str, Allocation]


@dataclass(frozen=True)
class Recipe:
    """A kind and how strongly its weights are kept small."""

    kind: str
    strength: float | None

    def __str__(self) -> str:
        return self.kind if self.strength is None else f"{self.kind} {self.strength:g}"


@dataclass(frozen=True)
class Tried:
    """What a recipe comes to on models left out.

    Attributes:
        agreement: by model, of its curves with what was measured.
        allocations: by model, at each of `TARGETS`.
    """

    recipe: Recipe
    agreement: Mapping[str, Mapping[str, float]]
    allocations: Mapping[str, Sequence[Allocation]]


@dataclass(frozen=True)
class Trial:
    """Leaves out each model in turn."""

    members: Sequence[Measured]

    def __call__(self, recipe: Recipe) -> tuple[float, Tried]:
        """The mean error of the logarithms of damages, and what there is to be scored."""
        torch.set_num_threads(1)
        left_out = leave_one_out(recipe.kind, self.members, strength=recipe.strength, rule=RULE)
        found, allocations = {}, {}
        for member in self.members:
            if member.is_measured:
                general, space = left_out[member.name], space_of(member.name)
                found[member.name] = agreement(general.curves(member.features), member)
                answer = general.answering(member.features)
                allocations[member.name] = [answer(space, space.budget(target)) for target in TARGETS]
        return float(np.mean([values["error"] for values in found.values()])), Tried(recipe, found, allocations)


class Scorer:
    """Measures what allocations cost; a model is loaded when the first of its allocations is asked for."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._scores: dict[str, Scores] = {}

    def __call__(self, asked: Asked) -> float:
        """The mean KL on the reward samples."""
        name, allocation = asked
        torch.set_num_threads(1)
        return self._scores.setdefault(name, Scores(name, self._work)).rewarded(allocation)


def agreement(curves: Curves, member: Measured) -> dict[str, float]:
    """How predicted curves agree with what was measured of a model that was left out."""
    known = ~np.isnan(member.logs)
    error = curves.mean[known] - member.logs[known]
    low, high = curves.interval()
    inside = (low <= member.damages) & (member.damages <= high)
    return {
        "error": float(np.sqrt(np.mean(error**2))),
        "tau": kendall(curves.mean[known], member.logs[known]),
        "inside": float(inside[known].mean()),
    }


def kendall(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's τ of two lists [n]: the share of pairs that they order alike, less that of those they do not."""
    pairs = np.triu_indices(len(first), 1)
    alike = np.sign(first[pairs[0]] - first[pairs[1]]) * np.sign(second[pairs[0]] - second[pairs[1]])
    return float(alike.mean())


def scored(tried: Sequence[Tried], compute: Compute, work: Path, config: Config) -> list[dict[str, float]]:
    """By trial and model left out: its KL by uniform's, in the geometric mean over `TARGETS`."""
    scores = {name: Scores(name, work) for name in tried[0].allocations}
    even = {name: [uniform(of.space, of.space.budget(target)) for target in TARGETS] for name, of in scores.items()}
    asked = [
        (name, one) for found in (even, *(each.allocations for each in tried)) for name in found for one in found[name]
    ]
    missing = [(name, one) for name, one in dict.fromkeys(asked) if not scores[name].knows("reward", one)]
    for (name, one), kl in compute.map(partial(Scorer, work), missing, config):
        scores[name].keep("reward", one, kl)

    def logs(name: str, allocations: Sequence[Allocation]) -> np.ndarray:
        return np.log([scores[name].reward(one) for one in allocations])

    return [
        {
            name: float(np.exp(np.mean(logs(name, found) - logs(name, even[name]))))
            for name, found in each.allocations.items()
        }
        for each in tried
    ]


def show(tried: Sequence[Tried], ratios: Sequence[Mapping[str, float]]) -> None:
    """A line for each trial, the best first."""
    for each, found in sorted(zip(tried, ratios), key=lambda pair: mean_ratio(pair[1])):
        means = {
            key: np.mean([values[key] for values in each.agreement.values()]) for key in ("error", "tau", "inside")
        }
        row = {"KL by uniform's": mean_ratio(found), **found, **means}
        print(f"{each.recipe!s:<14}", "  ".join(f"{key} {value:.3f}" for key, value in row.items()))


def mean_ratio(ratios: Mapping[str, float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(list(ratios.values())))))


def main() -> None:
    """Prints the comparison and writes what ships."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=FITS, help="writes the best of this kind, whatever is best")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, default=Path("runs/zoo"), help="the folder of the zoo's weights")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="Ray's; 0 works in this process")
    options = parser.parse_args()
    compute, members, work = compute_with(options.workers), load_members(), options.work.resolve()
    config = load_config(find_config(EMBEDDED), workers=options.workers)
    recipes = [Recipe(kind, strength) for kind, strengths in STRENGTHS.items() for strength in strengths]
    trials = {str(recipe): recipe for recipe in recipes}
    tried = compute.tune(Trial(members), trials, Location.parse(work / "tune"), progress=True)
    ratios = scored(tried, compute, work, config)
    show(tried, ratios)
    allowed = [pair for pair in zip(ratios, recipes) if options.kind in (None, pair[1].kind)]
    _, best = min(allowed, key=lambda pair: mean_ratio(pair[0]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    fit_general(best.kind, members, strength=best.strength, rule=RULE).save(options.out)
    print(f"{options.out}: {best}")


if __name__ == "__main__":
    main()
