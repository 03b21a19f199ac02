"""The UCB tree of one target: proposes allocations, learns from their rewards (LOP 4.2 and A.3)."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lop.search.evaluation import Evaluation
from lop.search.guide import Guide
from lop.search.moves import perturb
from lop.search.racing import Candidate, Opponent
from lop.space.allocation import Allocation, Space


@dataclass(frozen=True)
class TreeOptions:
    """How a tree grows.

    Attributes:
        simulations: selections from the root, known allocations included.
        evaluations: allocations evaluated at most.
        exploration: `c` of the UCB rule.
        step: `δ_0`, the largest change of an axis's ratio at the root.
        decay: `γ`; a child at depth d changes its parent by at most `δ_0·γ^d`.
        children: children of a node before it counts as fully expanded (the root: besides the given starts).
        depth: the deepest a node may be.
        window: simulations in flight, a constant of the search and not of the cluster.
        guided: of moves drawn at random, the one is taken that a Gaussian process through the rewards so far promises
            most of (`lop.search.guide`); otherwise the paper's moves are taken as they are drawn.
        opponent: a candidate races against the allocation that is the how-manieth best of the target when it is asked
            for; 0: no races.
    """

    simulations: int
    evaluations: int
    exploration: float
    step: float
    decay: float
    children: int
    depth: int
    window: int
    guided: bool = False
    opponent: int = 0


@dataclass
class Node:
    """An allocation in the tree with its running totals."""

    allocation: Allocation
    depth: int
    parent: "Node | None" = None
    children: list["Node"] = field(default_factory=list)
    visits: int = 0
    in_flight: int = 0
    total: float = 0.0

    @property
    def seen(self) -> int:
        """Visits, those in flight included (the N of WU-UCT, Liu et al., ICLR 2020)."""
        return self.visits + self.in_flight


@dataclass(frozen=True)
class Depth:
    """One depth of a tree: how many nodes it has, and the visits of them together."""

    nodes: int
    visits: int


class SearchTree:
    """One target's search, a function of (options, seed, rewards) alone.

    At most `window` simulations are in flight, and they are committed in the order in which they were made, each
    before the next is made in its place. So neither the number of workers nor their speed can change the result.

    Call `advance` for the allocations that need an evaluation, `tell` each result in any order, and repeat until
    `done`.

    Args:
        starts: the root's allocation and then the allocations of its first children; all of one budget.
        budget: theirs; what the first one costs if None, which is it wherever all units cost the same.
        reward: the number that an evaluation is worth; more is better.
        tie_breaker: tells evaluations of equal reward apart.
        seed: what the random moves are drawn from.
    """

    def __init__(
        self,
        space: Space,
        starts: Sequence[Allocation],
        options: TreeOptions,
        *,
        seed: Sequence[int],
        budget: int | None = None,
        reward: Callable[[Evaluation], float],
        tie_breaker: Callable[[Evaluation], float] = lambda evaluation: evaluation.log_probability,
    ) -> None:
        self.space = space
        self.budget = space.cost(starts[0].widths) if budget is None else budget
        self.root = Node(starts[0], depth=0)
        self.results: dict[Allocation, Evaluation] = {}
        self.simulations = 0
        self._options = options
        self._reward = reward
        self._tie_breaker = tie_breaker
        self._random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(seed))))
        self._starts = deque(dict.fromkeys(starts))
        self._first_children = len(self._starts) - 1
        self._asked: set[Allocation] = set()
        self._arrived: dict[Allocation, Evaluation] = {}
        self._flights: deque[Node] = deque()
        self._guide = Guide(space, self.budget) if options.guided else None

    @property
    def limit(self) -> int:
        """The most allocations that are evaluated."""
        return min(self._options.evaluations, self._options.simulations)

    @property
    def most_in_flight(self) -> int:
        """The most evaluations that the tree can still have in flight at a time; falls to 0 towards its end."""
        new = min(self._options.evaluations - len(self._asked), self._options.simulations - self.simulations)
        return min(self._options.window, len(self._asked) - len(self.results) + new)

    @property
    def done(self) -> bool:
        """Whether every simulation has been made and committed."""
        return not self._flights and self._exhausted

    @property
    def best(self) -> tuple[Allocation, Evaluation]:
        """The allocation with the best reward of those scored in full; of equals by tie-breaker, then the first.

        One that could not be evaluated is the answer only where none could.
        """
        best = self.ranked[0]
        return best, self.results[best]

    @property
    def ranked(self) -> list[Allocation]:
        """The allocations scored in full, the best by reward first; see `best`."""
        complete = [item for item in self.results.items() if item[1].is_complete]
        return [allocation for allocation, _ in sorted(complete, key=self._rank, reverse=True)]

    def confirmed(self, found: Mapping[Allocation, Evaluation]) -> Allocation:
        """The best of some allocations by what they said to samples kept back; of equals the first."""
        return max(found.items(), key=self._rank)[0]

    def add_start(self, allocation: Allocation) -> None:
        """One more allocation for the root's first children; before the first `advance`."""
        if allocation not in self._starts:
            self._starts.append(allocation)
            self._first_children += 1

    def tell(self, allocation: Allocation, evaluation: Evaluation) -> None:
        """Hands in the result of an allocation that `advance` asked for."""
        self._arrived[allocation] = evaluation

    def advance(self) -> list[Candidate]:
        """Commits what has arrived, in order, and returns the new allocations to evaluate.

        Each comes with its opponent, which is chosen among what is committed now, and so depends on no worker.
        """
        wanted: list[Candidate] = []
        while True:
            while len(self._flights) < self._options.window and not self._exhausted:
                allocation = self._simulate()
                if allocation is not None:
                    wanted.append(self.candidate(allocation))
            if not self._flights or not self._commit():
                return wanted

    def candidate(self, allocation: Allocation) -> Candidate:
        """The allocation, to be evaluated against whom it has to beat now."""
        return Candidate(allocation, self._opponent())

    def learn(self, allocation: Allocation, evaluation: Evaluation) -> None:
        """Takes the result of an allocation that it did not ask for, once it is done."""
        self.results.setdefault(allocation, evaluation)

    def depths(self) -> list[Depth]:
        """The tree's shape, from the root down."""
        found: list[Depth] = []
        level = [self.root]
        while level:
            found.append(Depth(len(level), sum(node.visits for node in level)))
            level = [child for node in level for child in node.children]
        return found

    def _opponent(self) -> Opponent | None:
        rank = self._options.opponent
        if not rank:
            return None
        able = [(a, e) for a, e in self.results.items() if e.record]
        if len(able) < rank:
            return None
        allocation, evaluation = sorted(able, key=lambda item: self._value(item[1]), reverse=True)[rank - 1]
        assert evaluation.record
        return Opponent(allocation, evaluation.record)

    def _rank(self, item: tuple[Allocation, Evaluation]) -> tuple[float, ...]:
        return not item[1].error, *self._value(item[1])

    def _value(self, evaluation: Evaluation) -> tuple[float, float]:
        return self._reward(evaluation), self._tie_breaker(evaluation)

    @property
    def _exhausted(self) -> bool:
        return self.simulations >= self._options.simulations or len(self._asked) >= self._options.evaluations

    def _simulate(self) -> Allocation | None:
        """Walks from the root to a node, marks the path, and returns the node's allocation if it is a new one."""
        self.simulations += 1
        node = self._select()
        self._flights.append(node)
        for step in _path(node):
            step.in_flight += 1
        if node.allocation in self._asked:
            return None
        self._asked.add(node.allocation)
        return node.allocation

    def _commit(self) -> bool:
        """Commits the oldest simulation if its result is known."""
        node = self._flights[0]
        evaluation = self.results.get(node.allocation) or self._arrived.pop(node.allocation, None)
        if evaluation is None:
            return False
        self.results.setdefault(node.allocation, evaluation)
        self._flights.popleft()
        reward = self._reward(evaluation)
        for step in _path(node):
            step.in_flight -= 1
            step.visits += 1
            step.total += reward
        return True

    def _select(self) -> Node:
        if self._starts:
            allocation = self._starts.popleft()
            return self.root if allocation == self.root.allocation else _adopt(self.root, allocation)
        node = self.root
        while node.depth < self._options.depth:
            given = self._first_children if node is self.root else 0
            if len(node.children) < self._options.children + given:
                return self._expand(node)
            node = self._best_child(node)
        return node

    def _best_child(self, node: Node) -> Node:
        """By `Q(s,a) + c·sqrt(ln N(s) / N(s,a))`; a child whose first result is in flight borrows its parent's mean."""
        logarithm, mean, exploration = math.log(node.seen), node.total / max(node.visits, 1), self._options.exploration

        def upper_bound(child: Node) -> float:
            value = child.total / child.visits if child.visits else mean
            return value + exploration * math.sqrt(logarithm / (child.visits + child.in_flight))

        return max(node.children, key=upper_bound)

    def _expand(self, node: Node) -> Node:
        size = self._options.step * self._options.decay ** (node.depth + 1)
        if self._guide is None:
            return _adopt(node, perturb(node.allocation, self.space, self.budget, self._random, size))
        rewards = {allocation: self._reward(evaluation) for allocation, evaluation in self.results.items()}
        shares = {allocation: evaluation.scored for allocation, evaluation in self.results.items()}
        return _adopt(node, self._guide.move([node.allocation], size, self._random, rewards, shares, self._asked))


def _adopt(parent: Node, allocation: Allocation) -> Node:
    child = Node(allocation, parent.depth + 1, parent)
    parent.children.append(child)
    return child


def _path(node: Node | None) -> list[Node]:
    path = []
    while node is not None:
        path.append(node)
        node = node.parent
    return path
