"""All targets' trees over one pool of workers."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from lop.allocation import Allocation
from lop.evaluator import Evaluation, Evaluator
from lop.ledger import Ledger
from lop.tree import SearchTree


class Workers(Protocol):
    """Whatever evaluates allocations: this process, or a fleet of actors."""

    @property
    def capacity(self) -> int:
        """How many allocations to hand over at a time, now."""

    def submit(self, allocation: Allocation) -> None:
        """Takes an allocation to evaluate."""

    def collect(self) -> list[tuple[Allocation, Evaluation]]:
        """Waits until at least one submitted allocation is evaluated, and returns all that are."""


class InProcess:
    """Evaluates in this process, one allocation at a time."""

    capacity = 1

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._waiting: deque[Allocation] = deque()

    def submit(self, allocation: Allocation) -> None:
        """Takes an allocation to evaluate."""
        self._waiting.append(allocation)

    def collect(self) -> list[tuple[Allocation, Evaluation]]:
        """Evaluates the allocation that has waited longest."""
        allocation = self._waiting.popleft()
        return [(allocation, self._evaluator.evaluate(allocation))]


def run_search(
    trees: Mapping[float, SearchTree],
    workers: Workers,
    ledger: Ledger,
    *,
    on_commit: Callable[[Mapping[float, SearchTree]], None] = lambda trees: None,
) -> None:
    """Runs every tree to its end.

    Each result is in the ledger before its tree sees it, and what the ledger holds is not evaluated again: an
    interrupted search is resumed by running it again, and ends as if nothing had happened. Allocations wait in the
    order in which the trees ask, so that no tree starves.

    Args:
        trees: by target ratio; of different budgets, so that no two ask for the same allocation.
        on_commit: called with the trees after each round of results.
    """
    owners = {tree.budget: tree for tree in trees.values()}
    waiting: deque[Allocation] = deque()
    running = 0

    def advance(tree: SearchTree) -> None:
        # What the ledger knows is told at once, which may let the tree ask for more.
        asked = tree.advance()
        while asked:
            known = [(allocation, ledger.get(allocation)) for allocation in asked]
            waiting.extend(allocation for allocation, evaluation in known if evaluation is None)
            for allocation, evaluation in known:
                if evaluation is not None:
                    tree.tell(allocation, evaluation)
            asked = tree.advance()

    for tree in trees.values():
        advance(tree)
    on_commit(trees)
    while waiting or running:
        while waiting and running < workers.capacity:
            workers.submit(waiting.popleft())
            running += 1
        results = workers.collect()
        running -= len(results)
        for allocation, evaluation in results:
            ledger.append(allocation, evaluation)
            owners[allocation.budget].tell(allocation, evaluation)
        for budget in dict.fromkeys(allocation.budget for allocation, _ in results):
            advance(owners[budget])
        on_commit(trees)
