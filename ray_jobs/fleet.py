"""Any number of evaluator actors, seen as one `lop.search.Workers`."""

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    UnserializableException,
)

from lop.allocation import Allocation
from lop.errors import LopError
from lop.evaluator import Evaluation
from ray_jobs.actor import Evaluates, EvaluatorActor

log = logging.getLogger(__name__)
_PER_ACTOR = 2  # One evaluation runs while the next one waits beside it.
_ATTEMPTS = 3
_SECONDS_OF_SILENCE = 60
# What `evaluate` raised; an exception that cannot be unpickled here comes as the second.
_FAILED = (RayTaskError, UnserializableException)
# The actor is gone. One that the machine's memory monitor ended comes as OutOfMemoryError.
_LOST = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)


@dataclass
class _Member:
    actor: Any
    preparing: Any
    pid: int | None = None
    running: dict[Any, Allocation] = field(default_factory=dict)
    failed: set[Allocation] = field(default_factory=set)


class Fleet:
    """Evaluates on actors that may come up late, die, and be replaced; results carry no trace of it.

    A dead actor is replaced and its allocations are evaluated elsewhere. An evaluation that raises is tried three
    times in all, on other actors where there are any.

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
            done, _ = ray.wait(references, num_returns=1, timeout=_SECONDS_OF_SILENCE)
            done, _ = ray.wait(references, num_returns=len(references), timeout=0)
            if not self._ready and not done:
                log.warning("waiting for a worker: each needs %s; the cluster has %s", self._options, _resources())
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
        free = sum(_PER_ACTOR - len(member.running) for member in self._ready)
        for allocation in list(self._waiting):
            if not free:
                return
            # One that has failed goes to an actor that has not tried it, even if that one is busy now.
            able = [member for member in self._ready if allocation not in member.failed] or self._ready
            member = min(able, key=lambda member: len(member.running))
            if len(member.running) < _PER_ACTOR:
                self._waiting.remove(allocation)
                member.running[member.actor.evaluate.remote(allocation)] = allocation
                free -= 1

    def _welcome(self, member: _Member) -> None:
        try:
            member.pid = ray.get(member.preparing)
        except _FAILED as error:
            raise LopError(f"a worker could not be set up: {_reason(error)}") from error
        except _LOST as error:
            # Before `prepare` runs, an actor may fail to unpickle `build`: so would its replacements.
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise LopError(f"a worker could not be set up: {_reason(error)}") from error
            self._replace(member, error)
        except RayError as error:  # Its environment cannot be made, or no machine may hold it.
            raise LopError(f"a worker could not be set up: {_reason(error)}") from error

    def _receive(self, member: _Member, reference: Any) -> list[tuple[Allocation, Evaluation]]:
        try:
            evaluation: Evaluation = ray.get(reference)
        except _FAILED as error:
            allocation = member.running.pop(reference)
            member.failed.add(allocation)
            self._failures[allocation] += 1
            log.warning("evaluation of %s failed: %s", allocation.widths, _reason(error))
            if self._failures[allocation] >= _ATTEMPTS:
                raise LopError(f"allocation {allocation.widths} failed {_ATTEMPTS} times: {_reason(error)}") from error
            self._waiting.appendleft(allocation)
            return []
        except _LOST as error:
            self._replace(member, error)
            return []
        self._deaths_in_a_row = 0
        return [(member.running.pop(reference), evaluation)]

    def _replace(self, member: _Member, error: RayError) -> None:
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > self._most_deaths:
            how = f"{self._deaths_in_a_row} workers in a row died before they could evaluate anything"
            raise LopError(f"{how}: {next(iter(str(error).splitlines()), type(error).__name__)}") from error
        log.warning("a worker died: another takes its place, and its %d evaluations", len(member.running))
        self._waiting.extendleft(reversed(member.running.values()))
        member.running.clear()
        ray.kill(member.actor)
        self._members[self._members.index(member)] = self._recruit()


def _reason(error: RayError) -> str:
    """The first line of what was raised on the actor; where only its traceback came here, that one's last line."""
    cause = getattr(error, "cause", None)
    if cause is None:
        return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    name, message = type(cause).__name__, next(iter(str(cause).strip().splitlines()), "")
    if isinstance(cause, LopError):
        return message
    return f"{name}: {message}" if message else name


def _resources() -> dict[str, float]:
    return {name: amount for name, amount in ray.cluster_resources().items() if name in ("CPU", "GPU")}
