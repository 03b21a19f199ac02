"""All targets' trees over one pool of workers."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

from lop.search.evaluation import Evaluation, Scorer
from lop.search.ledger import Ledger
from lop.search.racing import Candidate
from lop.search.tree import SearchTree
from lop.space.allocation import Allocation

_SECONDS_A_ROUND = 1.0


class Workers(Protocol):
    """Whatever evaluates allocations: this process, or a fleet of actors."""

    @property
    def capacity(self) -> int:
        """How many allocations to hand over at a time, now."""

    @property
    def alive(self) -> int:
        """How many workers can evaluate now."""

    def expect(self, most: int) -> None:
        """Says that from now on no more than `most` allocations will be handed over at a time."""

    def submit(self, candidate: Candidate) -> None:
        """Takes an allocation to evaluate."""

    def collect(self, seconds: float) -> list[tuple[Allocation, Evaluation]]:
        """Waits until a submitted allocation is evaluated, and returns all that are; none if it takes too long."""


class InProcess:
    """Evaluates in this process, one allocation at a time."""

    capacity = 1
    alive = 1

    def __init__(self, evaluator: Scorer) -> None:
        self._evaluator = evaluator
        self._waiting: deque[Candidate] = deque()

    def expect(self, most: int) -> None:
        """Changes nothing: there is one process."""

    def submit(self, candidate: Candidate) -> None:
        """Takes an allocation to evaluate."""
        self._waiting.append(candidate)

    def collect(self, seconds: float) -> list[tuple[Allocation, Evaluation]]:
        """Evaluates the allocation that has waited longest, however long it takes."""
        if not self._waiting:
            return []
        candidate = self._waiting.popleft()
        return [(candidate.allocation, self._evaluator.evaluate(candidate))]


class Watcher(Protocol):
    """Whoever follows a search."""

    def advanced(self, tree: SearchTree) -> None:
        """A tree has committed results."""

    def prepared(self, step: str, done: int, planned: int) -> None:
        """So many of the evaluations of a step that comes before the trees are done."""

    def tick(self, workers: Workers) -> None:
        """A round is over; called at least every second or two, and thousands of times a second at most."""


def run_search(
    trees: Collection[SearchTree], workers: Workers, ledger: Ledger, *, watcher: Watcher | None = None
) -> None:
    """Runs every tree to its end.

    Results are held back until the ledger has them in storage, and then told to their trees; what the ledger holds is
    not evaluated again. So an interrupted search is resumed by running it again, and ends as if nothing had happened.
    Allocations wait in the order in which the trees ask, so that no tree starves.

    Args:
        trees: of different budgets, so that no two ask for the same allocation.
    """
    owners: dict[Allocation, SearchTree] = {}
    most = {tree.budget: tree.most_in_flight for tree in trees}
    total = sum(most.values())
    waiting: deque[Candidate] = deque()
    held: list[tuple[Allocation, Evaluation]] = []
    running = 0

    def advance(tree: SearchTree) -> None:
        nonlocal total
        # What the ledger knows is told at once, which may let the tree ask for more.
        asked = tree.advance()
        while asked:
            known = [(candidate, ledger.get(candidate)) for candidate in asked]
            waiting.extend(candidate for candidate, evaluation in known if evaluation is None)
            owners.update((candidate.allocation, tree) for candidate in asked)
            for candidate, evaluation in known:
                if evaluation is not None:
                    tree.tell(candidate.allocation, evaluation)
            asked = tree.advance()
        now = tree.most_in_flight
        total += now - most[tree.budget]
        most[tree.budget] = now
        if watcher:
            watcher.advanced(tree)

    def release() -> None:
        ledger.flush()
        told = {owners[allocation].budget: owners[allocation] for allocation, _ in held}
        for allocation, evaluation in held:
            owners[allocation].tell(allocation, evaluation)
        held.clear()
        for tree in told.values():
            advance(tree)
        workers.expect(total)

    for tree in trees:
        advance(tree)
    workers.expect(total)
    while waiting or running or held:
        while waiting and running < workers.capacity:
            workers.submit(waiting.popleft())
            running += 1
        results = workers.collect(min(ledger.due, _SECONDS_A_ROUND)) if running else []
        running -= len(results)
        for allocation, evaluation in results:
            ledger.append(allocation, evaluation)
        held += results
        # Not later than when half of what the workers could have is held back from them.
        if held and (ledger.due == 0 or (not waiting and 2 * running <= workers.capacity)):
            release()
        if watcher:
            watcher.tick(workers)


def evaluate_recorded(
    candidates: Sequence[Candidate],
    workers: Workers,
    ledger: Ledger,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[Allocation, Evaluation]:
    """Evaluates candidates of distinct allocations, but for those that the ledger holds, and puts them there.

    Args:
        progress: told at the start, and about every second, how many are known.
    """
    found = {each.allocation: known for each in candidates if (known := ledger.get(each))}
    progress(len(found))
    for results in evaluate_each([each for each in candidates if each.allocation not in found], workers):
        for allocation, evaluation in results:
            ledger.append(allocation, evaluation)
        found |= dict(results)
        if ledger.due == 0:
            ledger.flush()
        progress(len(found))
    ledger.flush()
    return found


def evaluate_each(candidates: Sequence[Candidate], workers: Workers) -> Iterator[list[tuple[Allocation, Evaluation]]]:
    """Evaluates candidates that do not depend on each other's results.

    Yields:
        Results as they come, in any order; none where nothing has come for about a second.
    """
    workers.expect(len(candidates))
    waiting = deque(candidates)
    running = 0
    while waiting or running:
        while waiting and running < workers.capacity:
            workers.submit(waiting.popleft())
            running += 1
        results = workers.collect(_SECONDS_A_ROUND)
        running -= len(results)
        yield results
