"""Who is to blame when an evaluation fails or a worker dies: the allocation, the worker, or everything.

A rule without Ray: it is told what happened, and says what follows.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

from lop.errors import LopError
from lop.search.racing import Candidate

# So many workers must fail at an allocation, and a worker at so many allocations.
ATTEMPTS = 3
# An allocation is at fault for its workers' deaths once chance would explain them with less than this probability.
_CHANCE = 1e-5
_MOST_DEATHS = 25
# So many deaths in a row, and none evaluated between them, are not the allocations' fault.
_DEATHS_AT_FIRST = 10
_DEATHS_LATER = 100
# So many allocations given up in a row, and none evaluated between them, are not the allocations' fault.
GIVEN_UP_AT_FIRST = 3
_GIVEN_UP_LATER = 20


@dataclass
class _Trouble:
    """What an allocation has against it.

    Attributes:
        tried: the workers that have failed at it.
        raised_on: those of them that are not at fault themselves, each as often as it failed.
        deaths: the workers that died of it alone.
        replaced: after how many failures a worker was last replaced for it.
    """

    tried: set[Hashable] = field(default_factory=set)
    raised_on: list[Hashable] = field(default_factory=list)
    deaths: int = 0
    replaced: int = 0


@dataclass
class _Record:
    """A worker's failures since it last succeeded, and how much had been evaluated in all when they began."""

    failing: set[Candidate] = field(default_factory=set)
    evaluated_then: int = 0


class Blame:
    """Keeps count of what fails.

    An allocation is given up after `ATTEMPTS` failures on workers that are not at fault themselves, or once too many
    workers died of it alone: the more often workers die of other things, the more of them it takes. What is given up is
    held back until something succeeds, which tells a bad allocation from a bad cluster.

    Attributes:
        evaluated: evaluations that succeeded.
    """

    def __init__(self) -> None:
        self.evaluated = 0
        self._troubles: dict[Candidate, _Trouble] = {}
        self._records: dict[Hashable, _Record] = {}
        self._given_up: dict[Candidate, str] = {}
        self._deaths = 0
        self._deaths_in_a_row = 0

    def __contains__(self, candidate: Candidate) -> bool:
        """Whether an allocation has something against it."""
        return candidate in self._troubles

    @property
    def has_given_up(self) -> bool:
        """Whether allocations are held back as failed."""
        return bool(self._given_up)

    def has_tried(self, candidate: Candidate, worker: Hashable) -> bool:
        """Whether the worker has failed at the allocation."""
        return worker in self._troubles[candidate].tried

    def wants_another(self, candidate: Candidate) -> bool:
        """Whether an allocation that all workers have failed at is worth a new worker: one for each failure."""
        trouble = self._troubles[candidate]
        wants = trouble.replaced < len(trouble.raised_on)
        trouble.replaced = len(trouble.raised_on)
        return wants

    def succeeded(self, candidate: Candidate, worker: Hashable) -> None:
        """An allocation has been evaluated."""
        self.evaluated += 1
        self._deaths_in_a_row = 0
        self._records.pop(worker, None)
        self._troubles.pop(candidate, None)

    def failed(self, candidate: Candidate, worker: Hashable, reason: str) -> bool:
        """An evaluation raised on a worker, or took too long. Returns whether to try it again.

        Raises:
            LopError: nothing can be evaluated.
        """
        record = self._records.setdefault(worker, _Record(evaluated_then=self.evaluated))
        record.failing.add(candidate)
        trouble = self._troubles.setdefault(candidate, _Trouble())
        trouble.tried.add(worker)
        trouble.raised_on.append(worker)
        if len(trouble.raised_on) < ATTEMPTS:
            return True
        self._give_up(candidate, reason)
        return False

    def is_at_fault(self, worker: Hashable) -> bool:
        """Whether a worker fails at everything while others do not; then its failures are forgotten."""
        record = self._records.get(worker)
        if record is None or len(record.failing) < ATTEMPTS or self.evaluated <= record.evaluated_then:
            return False
        for trouble in self._troubles.values():
            trouble.raised_on = [tried for tried in trouble.raised_on if tried != worker]
        return True

    def died(self) -> None:
        """A worker died at work, and its machine did not.

        Raises:
            LopError: so many in a row did that nothing can be evaluated.
        """
        self._deaths += 1
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= (_DEATHS_LATER if self.evaluated else _DEATHS_AT_FIRST):
            raise LopError(f"{self._deaths_in_a_row} workers in a row died before they could evaluate anything")

    def killed(self, candidate: Candidate) -> bool:
        """The worker that died was at this allocation alone. Returns whether to try it again.

        Raises:
            LopError: nothing can be evaluated.
        """
        trouble = self._troubles.setdefault(candidate, _Trouble())
        trouble.deaths += 1
        if trouble.deaths < self._deaths_that_tell(trouble.deaths):
            return True
        self._give_up(candidate, "its worker died each time")
        return False

    def release(self) -> dict[Candidate, str]:
        """The allocations that were held back, with what each failed of."""
        released, self._given_up = self._given_up, {}
        return released

    def _give_up(self, candidate: Candidate, reason: str) -> None:
        del self._troubles[candidate]
        self._given_up[candidate] = reason
        if len(self._given_up) >= (_GIVEN_UP_LATER if self.evaluated else GIVEN_UP_AT_FIRST):
            raise LopError(f"allocation {candidate.allocation.widths} failed {ATTEMPTS} times: {reason}")

    def _deaths_that_tell(self, own: int) -> int:
        """How many workers must die of one allocation until it is at fault, by how often others' workers die."""
        others = self._deaths - own
        share = (others + 1) / (self.evaluated + others + 2)
        return min(_MOST_DEATHS, max(ATTEMPTS, math.ceil(math.log(_CHANCE) / math.log(share))))
