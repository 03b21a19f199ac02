"""Any number of evaluator actors, seen as one `lop.search.Workers`."""

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.exceptions import RayActorError, RayTaskError

from lop.allocation import Allocation
from lop.errors import LopError
from lop.evaluator import Evaluation
from ray_jobs.actor import Evaluates, EvaluatorActor

log = logging.getLogger(__name__)
_PER_ACTOR = 2  # One evaluation runs while the next one waits beside it.
_ATTEMPTS = 3


@dataclass
class _Member:
    actor: Any
    preparing: Any
    pid: int | None = None
    running: dict[Any, Allocation] = field(default_factory=dict)


class Fleet:
    """Evaluates on actors that may come up late, die, and be replaced; results carry no trace of it.

    A dead actor is replaced and its allocations are evaluated elsewhere. An evaluation that raises is tried three
    times in all.

    Args:
        build: makes an actor's evaluator; sent to each actor, so it must be picklable.
        count: actors to ask for; the search starts with the first that is ready.
        cpus, gpus: that each actor holds.
    """

    def __init__(self, build: Callable[[], Evaluates], *, count: int, cpus: float = 1, gpus: float = 0) -> None:
        self._build = build
        self._options = {"num_cpus": cpus, "num_gpus": gpus}
        self._waiting: deque[Allocation] = deque()
        self._failures: Counter[Allocation] = Counter()
        self._deaths_in_a_row = 0
        self._most_deaths = 3 * count
        self._members = [self._recruit() for _ in range(count)]

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            ray.kill(member.actor)

    @property
    def capacity(self) -> int:
        """One running and one waiting evaluation for each ready actor; at least one, to wait for the first actor."""
        return max(1, _PER_ACTOR * len(self._ready))

    @property
    def pids(self) -> list[int]:
        """The process ids of the actors that are ready."""
        return [member.pid for member in self._members if member.pid is not None]

    def submit(self, allocation: Allocation) -> None:
        """Takes an allocation to evaluate."""
        self._waiting.append(allocation)
        self._dispatch()

    def collect(self) -> list[tuple[Allocation, Evaluation]]:
        """Waits until at least one allocation is evaluated, and returns all that are.

        Raises:
            LopError: a model cannot be loaded, an allocation fails three times, or actors keep dying.
        """
        results: list[tuple[Allocation, Evaluation]] = []
        while not results:
            self._dispatch()
            preparing = {member.preparing: member for member in self._members if member.pid is None}
            running = {reference: member for member in self._members for reference in member.running}
            references = [*running, *preparing]
            done, _ = ray.wait(references, num_returns=1)
            done, _ = ray.wait(references, num_returns=len(references), timeout=0)
            for reference in done:
                if reference in preparing:
                    self._welcome(preparing[reference])
                elif reference in running[reference].running:  # Not lost meanwhile with its actor.
                    results += self._receive(running[reference], reference)
        self._dispatch()
        return results

    @property
    def _ready(self) -> list[_Member]:
        return [member for member in self._members if member.pid is not None]

    def _recruit(self) -> _Member:
        actor = cast(Any, EvaluatorActor).options(**self._options).remote(self._build)
        return _Member(actor, actor.prepare.remote())

    def _dispatch(self) -> None:
        while self._waiting and self._ready:
            member = min(self._ready, key=lambda member: len(member.running))
            if len(member.running) >= _PER_ACTOR:
                return
            allocation = self._waiting.popleft()
            member.running[member.actor.evaluate.remote(allocation)] = allocation

    def _welcome(self, member: _Member) -> None:
        try:
            member.pid = ray.get(member.preparing)
        except RayTaskError as error:
            raise LopError(f"a worker could not be set up: {_reason(error)}") from error
        except RayActorError:
            self._replace(member)

    def _receive(self, member: _Member, reference: Any) -> list[tuple[Allocation, Evaluation]]:
        try:
            evaluation: Evaluation = ray.get(reference)
        except RayTaskError as error:
            allocation = member.running.pop(reference)
            self._failures[allocation] += 1
            log.warning("evaluation of %s failed: %s", allocation.widths, _reason(error))
            if self._failures[allocation] >= _ATTEMPTS:
                raise LopError(f"allocation {allocation.widths} failed {_ATTEMPTS} times: {_reason(error)}") from error
            self._waiting.appendleft(allocation)
            return []
        except RayActorError:
            self._replace(member)
            return []
        self._deaths_in_a_row = 0
        return [(member.running.pop(reference), evaluation)]

    def _replace(self, member: _Member) -> None:
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > self._most_deaths:
            raise LopError(f"{self._deaths_in_a_row} workers in a row died before they could evaluate anything")
        log.warning("a worker died: another takes its place, and its %d evaluations", len(member.running))
        self._waiting.extendleft(reversed(member.running.values()))
        member.running.clear()
        ray.kill(member.actor)
        self._members[self._members.index(member)] = self._recruit()


def _reason(error: RayTaskError) -> str:
    lines = str(error.cause or error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
