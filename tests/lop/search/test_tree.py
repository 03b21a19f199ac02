import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lop.search.evaluation import Evaluation
from lop.search.tree import Node, SearchTree, TreeOptions
from lop.space.allocation import Allocation, Space, project, uniform

SPACE = Space(5, 64, 4, 0.9)
BUDGET = SPACE.budget(0.5)
OPTIONS = TreeOptions(
    simulations=60, evaluations=40, exploration=0.05, step=0.3, decay=0.8, children=4, depth=6, window=3
)


def score(allocation: Allocation) -> Evaluation:
    """Best where the first layers are kept."""
    weights = np.linspace(1, 0.2, SPACE.layers)
    value = float(weights @ np.array(allocation.widths)) / float(weights.sum() * SPACE.neurons)
    return Evaluation(accuracy=round(value, 2), log_probability=value - 1)


def make_tree(options: TreeOptions = OPTIONS, *, starts: Sequence[Allocation] = (), seed: int = 3) -> SearchTree:
    return SearchTree(
        SPACE, [uniform(SPACE, BUDGET), *starts], options, seed=(seed,), reward=lambda result: result.accuracy
    )


def run(tree: SearchTree, random: np.random.Generator | None = None) -> list[Allocation]:
    """Answers every request, in random order and numbers if `random` is given, and returns the requests."""
    waiting = [candidate.allocation for candidate in tree.advance()]
    asked = list(waiting)
    while waiting:
        for _ in range(1 if random is None else int(random.integers(1, len(waiting) + 1))):
            allocation = waiting.pop(0 if random is None else int(random.integers(len(waiting))))
            tree.tell(allocation, score(allocation))
        new = [candidate.allocation for candidate in tree.advance()]
        asked += new
        waiting += new
    return asked


def nodes(node: Node) -> list[Node]:
    return [node, *(found for child in node.children for found in nodes(child))]


def shape(node: Node) -> tuple[object, ...]:
    return (node.allocation, node.visits, node.total, tuple(shape(child) for child in node.children))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_order_of_arrival_changes_nothing(seed: int) -> None:
    calm, hasty = make_tree(), make_tree()
    run(calm)
    run(hasty, np.random.default_rng(seed))
    assert shape(calm.root) == shape(hasty.root)
    assert calm.results == hasty.results
    assert list(calm.results) == list(hasty.results)


@given(st.integers(1, 8), st.integers(1, 30), st.integers(1, 60), st.integers(1, 5))
@settings(max_examples=40)
def test_limits_and_budget_hold(window: int, evaluations: int, simulations: int, depth: int) -> None:
    options = TreeOptions(simulations, evaluations, 0.1, 0.4, 0.7, 3, depth, window)
    tree = make_tree(options)
    asked = run(tree)
    assert tree.done
    assert len(asked) == len(set(asked)) == len(tree.results) <= min(evaluations, simulations)
    assert tree.simulations <= simulations
    for allocation in asked:
        assert allocation.budget == BUDGET
        assert all(SPACE.min_width <= width <= SPACE.neurons for width in allocation.widths)
        assert all(width % SPACE.granularity == 0 for width in allocation.widths)
    assert all(node.depth <= depth for node in nodes(tree.root))


def test_never_more_in_flight_than_the_window() -> None:
    tree = make_tree()
    assert len(tree.advance()) == OPTIONS.window
    assert tree.advance() == []


def test_visits_and_rewards_add_up_along_paths() -> None:
    tree = make_tree()
    run(tree)
    for node in nodes(tree.root):
        own = node.visits - sum(child.visits for child in node.children)
        assert own >= 0
        assert node.in_flight == 0
        rest = node.total - sum(child.total for child in node.children)
        assert rest == pytest.approx(own * tree.results[node.allocation].accuracy)
    assert tree.root.visits == tree.simulations


def test_a_start_that_is_added_is_a_start() -> None:
    start = project(np.linspace(0.2, 0.8, 5), SPACE, BUDGET)
    given, added = make_tree(starts=[start]), make_tree()
    added.add_start(start)
    added.add_start(start)
    run(given)
    run(added)
    assert shape(added.root) == shape(given.root)


def test_starts_come_first_and_only_once() -> None:
    starts = [project(np.linspace(0.2, 0.8, 5), SPACE, BUDGET), uniform(SPACE, BUDGET)]
    tree = make_tree(starts=starts)
    asked = run(tree)
    assert asked[:2] == [uniform(SPACE, BUDGET), starts[0]]
    assert tree.best[1].accuracy >= max(score(start).accuracy for start in starts)


def test_selection_agrees_with_a_naive_upper_bound() -> None:
    tree = make_tree(TreeOptions(50, 50, 0.2, 0.3, 0.8, 3, 4, 1))
    run(tree)
    parent = tree.root

    def bound(child: Node) -> float:
        mean = sum(tree.results[node.allocation].accuracy * own(node) for node in nodes(child)) / child.visits
        return mean + 0.2 * math.sqrt(math.log(parent.visits) / child.visits)

    def own(node: Node) -> int:
        return node.visits - sum(child.visits for child in node.children)

    assert len(parent.children) == 3
    assert bound(tree._best_child(parent)) == pytest.approx(max(map(bound, parent.children)))


@pytest.mark.parametrize("window", [1, 3])
def test_every_selection_agrees_with_a_naive_recount(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = TreeOptions(80, 80, 0.1, 0.3, 0.8, 2, 3, window)
    tree = make_tree(options)
    picked: list[list[Node]] = []  # The path of each simulation so far, root first.
    select = tree._select

    def spy() -> Node:
        known = picked[: len(picked) - len(tree._flights)]

        def bound(parent: Node, child: Node) -> float:
            rewards = [score(path[-1].allocation).accuracy for path in known if child in path]
            borrowed = [score(path[-1].allocation).accuracy for path in known if parent in path]
            visits = sum(parent in path for path in picked), sum(child in path for path in picked)
            mean = np.mean(rewards) if rewards else np.mean(borrowed)
            return float(mean) + options.exploration * math.sqrt(math.log(visits[0]) / visits[1])

        counts = {id(node): len(node.children) for node in nodes(tree.root)}
        bounds = {
            id(child): bound(parent, child)
            for parent in nodes(tree.root)
            for child in parent.children
            if len(parent.children) == options.children
        }
        node = select()
        path = [node]
        while path[0].parent is not None:
            path.insert(0, path[0].parent)
        for parent, child in pairwise(path):
            if id(child) in counts:
                assert counts[id(parent)] == options.children
                assert bounds[id(child)] == pytest.approx(max(bounds[id(other)] for other in parent.children))
        assert node is tree.root or id(node) not in counts or node.depth == options.depth
        picked.append(path)
        return node

    monkeypatch.setattr(tree, "_select", spy)
    run(tree)
    assert len(picked) == tree.simulations > 40


def test_search_improves_on_its_start() -> None:
    tree = make_tree()
    run(tree)
    assert tree.best[1].log_probability > score(uniform(SPACE, BUDGET)).log_probability + 0.02


def test_equal_rewards_are_told_apart_by_log_probability() -> None:
    tree = make_tree()
    run(tree)
    best = max(result.accuracy for result in tree.results.values())
    finalists = [result.log_probability for result in tree.results.values() if result.accuracy == best]
    assert tree.best[1].log_probability == max(finalists)


def test_golden_tree() -> None:
    tree = make_tree(TreeOptions(8, 8, 0.05, 0.3, 0.8, 2, 4, 2), seed=1)
    assert [allocation.widths for allocation in run(tree)] == [
        (32, 32, 32, 32, 32),
        (36, 20, 44, 20, 40),
        (32, 20, 36, 28, 44),
        (28, 20, 40, 24, 48),
        (32, 24, 40, 24, 40),
        (36, 32, 48, 12, 32),
        (32, 32, 52, 20, 24),
        (36, 40, 44, 8, 32),
    ]
    assert tree.best[0].widths == (36, 40, 44, 8, 32)
    assert [(node.depth, node.visits) for node in nodes(tree.root)] == [
        (0, 8),
        (1, 5),
        (2, 1),
        (2, 3),
        (3, 1),
        (3, 1),
        (1, 2),
        (2, 1),
    ]


def test_another_seed_makes_other_moves() -> None:
    assert run(make_tree(seed=1)) != run(make_tree(seed=2))
