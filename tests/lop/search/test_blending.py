"""What targets tell each other when their trees have ended."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lop.search.blending import blend, blends
from lop.search.evaluation import Evaluation
from lop.search.ledger import Ledger
from lop.search.loop import InProcess, run_search
from lop.search.racing import Candidate
from lop.search.tree import SearchTree, TreeOptions
from lop.space.allocation import Allocation, Space, project, uniform

SPACE = Space(8, 64, 2, 0.95)
OPTIONS = TreeOptions(
    simulations=8, evaluations=6, exploration=0.02, step=0.3, decay=0.8, children=6, depth=8, window=1
)
# How much of the ratio each layer should bear: the same shape at every budget.
SHAPE = np.array([0, 0.4, 1, 1.6, 2, 1.6, 1, 0.4])


class Shaped:
    """Worse the farther from the shape that is right for the budget; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Allocation] = []

    def evaluate(self, candidate: Candidate) -> Evaluation:
        self.asked.append(candidate.allocation)
        right = project(SHAPE * SPACE.ratio(candidate.allocation.budget), SPACE, candidate.allocation.budget)
        off = np.subtract(candidate.allocation.ratios(SPACE), right.ratios(SPACE))
        return Evaluation(0.5, -float(np.square(off).sum()))


class Silent:
    """Follows nothing."""

    def advanced(self, tree: SearchTree) -> None: ...

    def prepared(self, step: str, done: int, planned: int) -> None: ...

    def tick(self, workers: object) -> None: ...


def trees_of(ratios: list[float], starts: dict[float, Allocation] | None = None) -> list[SearchTree]:
    return [
        SearchTree(
            SPACE,
            list(dict.fromkeys([uniform(SPACE, SPACE.budget(r)), *([starts[r]] if starts and r in starts else [])])),
            OPTIONS,
            seed=(0, index),
            reward=lambda e: e.worth("log_probability"),
        )
        for index, r in enumerate(ratios)
    ]


def test_one_targets_luck_is_shared(tmp_path: Path) -> None:
    ratios = [0.2, 0.3, 0.4, 0.5]
    lucky = project(SHAPE * 0.3, SPACE, SPACE.budget(0.3))
    trees = trees_of(ratios, {0.3: lucky})
    scorer = Shaped()
    with Ledger(tmp_path, {}) as ledger:
        run_search(trees, InProcess(scorer), ledger)
        before = [tree.best[1].log_probability for tree in trees]
        asked = len(scorer.asked)
        blend(trees, 2, InProcess(scorer), ledger, Silent())
    after = [tree.best[1].log_probability for tree in trees]
    assert all(now >= then for now, then in zip(after, before, strict=True))
    # Scaled, the lucky shape is right next door, and in the second round one further.
    assert after[0] > before[0] / 4
    assert after[2] > before[2] / 4
    assert after[3] > before[3]
    assert len(scorer.asked) - asked <= 2 * 4 * len(trees)
    again = Shaped()
    with Ledger(tmp_path, {}) as ledger:
        replayed = trees_of(ratios, {0.3: lucky})
        run_search(replayed, InProcess(again), ledger)
        blend(replayed, 2, InProcess(again), ledger, Silent())
    assert not again.asked
    assert [tree.best for tree in replayed] == [tree.best for tree in trees]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(2, 90), min_size=1, max_size=5, unique=True), st.integers(0, 1000))
def test_blends_keep_the_budget_and_the_whole_layers_of_both(percent: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    budgets = sorted({SPACE.budget(p / 100) for p in percent}, reverse=True)
    trees = []
    for budget in budgets:
        wanted = random.uniform(0, 1, SPACE.axes) * (np.arange(SPACE.axes) > 0)  # The first layer stays whole.
        found = project(wanted * SPACE.ratio(budget) * SPACE.axes / max(wanted.sum(), 1e-9), SPACE, budget)
        (tree,) = trees_of([SPACE.ratio(budget)])
        tree.results[found] = Evaluation(0.5, -1.0)
        trees.append(tree)
    for index, tree in enumerate(trees):
        smaller = trees[index - 1] if index else None
        larger = trees[index + 1] if index + 1 < len(trees) else None
        made = blends(tree, smaller, larger)
        assert len(made) <= 4
        assert bool(made) == (len(trees) > 1)
        assert {allocation.budget for allocation in made} <= {tree.budget}
        if smaller and larger:
            whole = [min(w) == SPACE.neurons for w in zip(*(t.best[0].widths for t in (smaller, larger)))]
            # Between two there is nothing to round off: what both keep whole stays so, but for the last neurons.
            assert all(width >= SPACE.neurons - 8 for width, is_whole in zip(made[0].widths, whole) if is_whole)
