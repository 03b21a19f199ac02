"""How the systems that the paper names choose widths, against cases worked by hand and against trying everything."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from lop.errors import LopError
from lop.methods.darwinlm import least_error
from lop.methods.efficientllava import ETA, cross, minimise_risk, weight_norm
from lop.methods.evolution import Reach, mutate
from lop.methods.llm_pruner import middle_layers
from lop.methods.method import Given, Reward
from lop.methods.puzzletron import fitting, library
from lop.methods.registry import METHODS, USUAL_BASELINES
from lop.methods.tyr import coarse_to_fine, steps
from lop.model.importance import IMPORTANCES, OF_BOTH, SURVEYS_OF
from lop.search.evaluation import Evaluation
from lop.search.tree import TreeOptions
from lop.space.allocation import Allocation, Space, uniform
from tests.lop.methods.test_baselines import HAND

OPTIONS = TreeOptions(
    simulations=9, evaluations=9, exploration=0.1, step=0.3, decay=0.8, children=4, depth=4, window=2, opponent=0
)


def reward_of(losses: np.ndarray, space: Space, weights: np.ndarray, asked: list[Allocation]) -> Reward:
    """What says that a layer's ratio costs so much."""

    def evaluate(allocation: Allocation, share: float) -> Evaluation:
        asked.append(allocation)
        return Evaluation(0.0, -float(losses @ np.square(allocation.ratios(space))))

    def rate(evaluation: Evaluation) -> float:
        return evaluation.log_probability

    def refuse() -> None:
        raise AssertionError

    return Reward(41, 3, OPTIONS, lambda: weights, rate, rate, evaluate, refuse, refuse)  # type: ignore[arg-type]


def test_llm_pruner_leaves_its_first_and_last_layers_whole() -> None:
    # As published: layers 4 to 29 of 32, 26 of them, each by 0.25·32/26 of its 1,300 neurons: 400.
    widths = middle_layers(HAND, Space(32, 1300, 1, 0.95), 24 * 1300).widths
    assert widths == (1300,) * 4 + (900,) * 26 + (1300,) * 2
    # Where 26 layers cannot give what is asked, the others do.
    space = Space(32, 100, 1, 0.9)
    widths = middle_layers(HAND, space, space.budget(0.85)).widths
    assert sum(widths) == 480
    assert set(widths[4:30]) == {10}
    assert min(widths[:4]) >= 20


def test_darwinlm_has_the_least_sum_of_errors() -> None:
    space = Space(3, 8, 2, 0.75)
    errors = np.sort(np.random.default_rng(0).random((3, 9)), axis=1)[:, ::-1]
    every = [Allocation(widths) for widths in product((2, 4, 6, 8), repeat=3) if sum(widths) == 14]

    def total(allocation: Allocation) -> float:
        return sum(errors[layer, width] for layer, width in enumerate(allocation.widths))

    found = least_error(replace(HAND, surveys={"errors": errors}), space, 14)
    assert found == min(every, key=total)


def test_puzzletrons_library_and_programme() -> None:
    assert library(Space(2, 100, 1, 0.95)) == [5, 10, 20, 25, 50, 75, 87]
    assert library(Space(2, 100, 10, 0.8)) == [20, 50, 80, 90]
    space, widths = Space(3, 10, 1, 0.9), [1, 4, 7]
    scores = np.sort(np.random.default_rng(1).random((3, 3)), axis=1)[:, ::-1]
    levels = [*enumerate(widths), (3, 10)]
    table = np.hstack([scores, np.zeros((3, 1))])
    for budget in (3, 11, 16, 25, 30):
        fits = [each for each in product(levels, repeat=3) if sum(width for _, width in each) <= budget]
        least = min(sum(table[layer, level] for layer, (level, _) in enumerate(each)) for each in fits)
        chosen = fitting(space, widths, scores, budget)
        assert chosen.budget == budget
        # What is left of the budget is given to layers, and never taken from one.
        below = [max(level for level, width in levels if width <= got) for got in chosen.widths]
        assert sum(table[layer, level] for layer, level in enumerate(below)) <= least + 1e-12


def test_tyr_goes_from_coarse_to_fine_within_its_levels() -> None:
    assert steps(Space(2, 11008, 1, 0.9)) == [1376, 688, 344, 172]  # 12.5% to 1.56%.
    assert steps(Space(2, 160, 8, 0.9)) == [16, 8]
    space = Space(4, 64, 2, 0.9)
    random = np.random.default_rng(0)
    centre = uniform(space, space.budget(0.5))
    now = centre
    for _ in range(50):
        now = mutate(now, space, random, step=2, moves=4, reach=Reach(centre, 4))
        assert now.budget == centre.budget
        assert np.abs(np.subtract(now.widths, centre.widths)).max() <= 4
    asked: list[Allocation] = []
    losses = np.array([4.0, 1.0, 1.0, 0.1])
    (found,) = coarse_to_fine(space, reward_of(losses, space, np.ones((4, 64)), asked), [centre.budget], 0)
    first, last = found.curve[0], found.curve[-1]
    assert first == (1.0, -float(losses @ np.square(centre.ratios(space))))
    assert last[1] == found.worth[0] > first[1]
    assert last[0] <= 41
    moved = np.abs(np.subtract(asked[1].widths, asked[0].widths))
    assert moved.max() % 8 == 0  # The first moves are an eighth of a layer.


def test_efficientllava_weighs_the_norm_of_what_is_left() -> None:
    weights = np.array([[9.0, 16.0, 1.0], [4.0, 0.0, 5.0]])
    assert weight_norm(weights, Allocation((2, 3))) == 5 + 3
    space = Space(4, 64, 2, 0.9)
    first, second = Allocation((64, 32, 16, 16)), Allocation((16, 16, 32, 64))
    child = cross(first, second, space, np.random.default_rng(1))
    assert child.budget == 128
    # All losses are alike, so it keeps more of what weighs little. η decides how much that counts.
    heavy = np.ones((4, 64)) * np.array([[100.0], [1.0], [1.0], [1.0]])
    asked: list[Allocation] = []
    budget = space.budget(0.5)
    (found,) = minimise_risk(space, reward_of(np.zeros(4), space, heavy, asked), [budget], 0)
    assert ETA > 0
    assert found.best.widths[0] == min(allocation.widths[0] for allocation in asked) < 32
    assert found.curve[-1][0] <= 41


def test_what_no_survey_has_found_is_one_line() -> None:
    for name in SURVEYS_OF:
        with pytest.raises(LopError, match="which a survey finds"):
            (OF_BOTH[name].groups if name in OF_BOTH else IMPORTANCES[name])(HAND)
    space = Space(2, 3, 1, 0.7)
    with pytest.raises(LopError, match="lack 'errors'"):
        METHODS["darwinlm"](Given(space, "activation", HAND), 4)


def test_tables_that_name_no_baselines_cost_no_survey() -> None:
    assert {"llm-pruner", "llm-pruner-vector", "minitron", "darwinlm"}.isdisjoint(USUAL_BASELINES)
    assert {"uniform", "flap", "alphapruning"} <= set(USUAL_BASELINES)
