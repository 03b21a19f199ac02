"""Any number of evaluator actors, seen as one `lop.search.loop.Workers`."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, cast

import ray
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
)

from lop.errors import LopError
from lop.search.evaluation import Evaluation, Scorer
from lop.search.racing import Candidate
from lop.space.allocation import Allocation
from ray_jobs.actor import Answer, EvaluatorActor, told
from ray_jobs.blame import ATTEMPTS, GIVEN_UP_AT_FIRST, Blame
from ray_jobs.needs import ONE_CPU, Needs, Wait

log = logging.getLogger(__name__)
# Calls to an actor cost about a millisecond in all: short evaluations travel together.
_SECONDS_A_CALL = 0.05
_LARGEST_CALL = 64
_SECONDS_BETWEEN_CHECKS = 1.0
# The actor is gone. One that the machine's memory monitor ended comes as OutOfMemoryError.
_LOST = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)

Results = list[tuple[Allocation, Evaluation]]


@dataclass(eq=False)
class _Call:
    """Allocations on their way to an actor and back."""

    candidates: tuple[Candidate, ...]
    future: "Future[Any] | None" = None
    started: float = math.inf


@dataclass(eq=False)
class _Member:
    """An actor; `running` are the calls that it is at, the oldest first, and `queued` those that wait beside them."""

    actor: Any
    future: "Future[Any] | None" = None
    pid: int | None = None
    gone: bool = False
    running: dict[_Call, None] = field(default_factory=dict)
    queued: deque[_Call] = field(default_factory=deque)

    @property
    def calls(self) -> int:
        return len(self.running) + len(self.queued)


class Fleet:
    """Evaluates on actors that may come up late, die, and be replaced; results carry no trace of it.

    The actors asked for are the autoscaler's demand: as many as the search can keep busy, at most `count`. Work goes to
    those that are ready, one call running and one waiting beside it. A dead actor is replaced and what it had is
    evaluated elsewhere. An allocation that raises, or takes too long, on three actors, or of which three or more actors
    die, is answered by `Evaluation.failed`.

    Deaths count against an allocation only if it alone was running and its machine did not go as well; and the more
    often workers die of other things, the more of them it takes: an actor that somebody kills is not the fault of what
    it was doing. An actor that fails at everything, while others do not, is replaced and its failures are forgotten.
    Where everything fails, the search is ended and nothing recorded.

    Args:
        build: makes an actor's evaluator; sent to each actor, so it must be picklable.
        count: the most actors; the search starts with the first that is ready.
        needs: what each actor holds.
        seconds: that one evaluation may take.
        concurrency: evaluations that an actor runs at a time; more than one only where they wait and do not compute.
    """

    def __init__(
        self,
        build: Callable[[], Scorer],
        *,
        count: int,
        needs: Needs = ONE_CPU,
        seconds: float = math.inf,
        concurrency: int = 1,
    ) -> None:
        self._build = build
        self._options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "max_concurrency": concurrency}
        self._wait = Wait(needs)
        self._count = self._wanted = count
        self._seconds = seconds
        self._concurrency = concurrency
        self._members: dict[_Member, None] = {}
        # Ready actors by how full they are: with nothing to do, with a place to run, with a place to wait.
        self._free: tuple[dict[_Member, None], ...] = ({}, {}, {})
        self._arrived: SimpleQueue[tuple[_Member, _Call | None, Future[Any]]] = SimpleQueue()
        self._waiting: deque[Candidate] = deque()
        self._blame = Blame()
        self._alone: set[Candidate] = set()
        self._mean_seconds = math.inf
        self._ready = 0
        self._deaths_at_start = 0
        self._failed_to_start = False
        self._checked = time.monotonic()

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        for member in list(self._members):
            self._dismiss(member)

    @property
    def capacity(self) -> int:
        """What the ready actors take, running and waiting; at least enough to tell a bad allocation from bad actors."""
        return max(2 * GIVEN_UP_AT_FIRST, 2 * self._concurrency * self._ready * self._call_size)

    @property
    def alive(self) -> int:
        """Actors that are ready."""
        return self._ready

    @property
    def pids(self) -> list[int]:
        """The process ids of the actors that are ready."""
        return [member.pid for member in list(self._members) if member.pid is not None]

    def expect(self, most: int) -> None:
        """Keeps no more actors than can be busy when at most `most` allocations are asked for at a time."""
        self._wanted = min(self._count, -(-most // self._concurrency))
        for pool in ([m for m in self._members if m.pid is None], list(self._free[0])):
            for member in pool[: max(0, len(self._members) - self._wanted)]:
                self._dismiss(member)

    def submit(self, candidate: Candidate) -> None:
        """Takes an allocation to evaluate; it is sent when results are next collected."""
        self._waiting.append(candidate)

    def collect(self, seconds: float) -> Results:
        """Waits until at least one allocation is evaluated, at most `seconds`, and returns all that are.

        Raises:
            LopError: a model cannot be loaded, actors die before they are ready, or nothing can be evaluated.
        """
        until = time.monotonic() + seconds
        results: Results = []
        self._recruit()
        self._dispatch()
        while True:
            wait = 0.0 if results else max(0.0, min(until - time.monotonic(), _SECONDS_BETWEEN_CHECKS))
            try:
                self._hear(*self._arrived.get(timeout=wait), results)
            except Empty:
                self._check(results)
                if results or time.monotonic() >= until:
                    break
            self._heard_all(results)
            self._dispatch()
        return results

    def _heard_all(self, results: Results) -> None:
        while not self._arrived.empty():
            self._hear(*self._arrived.get(), results)
        self._recruit()

    def _hear(self, member: _Member, call: _Call | None, future: "Future[Any]", results: Results) -> None:
        if member.gone:
            return
        self._wait.heard()
        if call is None:
            self._welcome(member, future)
        else:
            self._receive(member, call, future, results)

    def _recruit(self) -> None:
        while len(self._members) < self._wanted:
            member = _Member(cast(Any, EvaluatorActor).options(**self._options).remote(self._build))
            member.future = self._listen(member, None, member.actor.prepare.remote())
            self._members[member] = None

    def _listen(self, member: _Member, call: _Call | None, reference: Any) -> "Future[Any]":
        future: Future[Any] = reference.future()
        future.add_done_callback(lambda done: self._arrived.put((member, call, done)))
        return future

    def _dismiss(self, member: _Member) -> None:
        """Ends an actor and takes back what it had, to be evaluated before anything else."""
        member.gone = True
        self._ready -= member.pid is not None
        del self._members[member]
        for places in self._free:
            places.pop(member, None)
        calls = [*member.running, *member.queued]
        self._waiting.extendleft(reversed([candidate for call in calls for candidate in call.candidates]))
        ray.kill(member.actor)

    @property
    def _call_size(self) -> int:
        return max(1, min(_LARGEST_CALL, int(_SECONDS_A_CALL / max(self._mean_seconds, 1e-9))))

    def _dispatch(self) -> None:
        # Calls no larger than that there is one to run and one to wait for each actor.
        places = max(1, 2 * self._concurrency * self._ready)
        size = min(self._call_size, -(-len(self._waiting) // places))
        postponed = []
        while self._waiting:
            candidate = self._waiting.popleft()
            member = self._choose(candidate)
            if member is None:
                postponed.append(candidate)
                if not any(self._free):
                    break
                continue
            call = _Call((candidate, *self._companions(candidate, size - 1)))
            self._send(member, call)
        self._waiting.extendleft(reversed(postponed))

    def _choose(self, candidate: Candidate) -> _Member | None:
        """The least busy actor with a free place; one that has failed goes only to an actor that has not tried it."""
        if candidate not in self._blame:
            return next((member for places in self._free for member in places), None)
        ready = [member for member in self._members if member.pid is not None]
        untried = [member for member in ready if not self._blame.has_tried(candidate, member)]
        if ready and not untried and self._blame.wants_another(candidate):
            # Another one takes this one's place, perhaps on another machine, and tries it anew.
            self._dismiss(min(ready, key=lambda member: member.calls))
        free = [member for member in untried if member.calls < 2 * self._concurrency]
        return min(free, key=lambda member: member.calls, default=None)

    def _companions(self, first: Candidate, most: int) -> list[Candidate]:
        """The next allocations in line that may go in the same call."""
        chosen: list[Candidate] = []
        if first in self._alone or first in self._blame:
            return chosen
        while len(chosen) < most and self._waiting:
            following = self._waiting[0]
            if following in self._alone or following in self._blame:
                break
            chosen.append(self._waiting.popleft())
        return chosen

    def _send(self, member: _Member, call: _Call) -> None:
        if len(member.running) < self._concurrency:
            self._start(member, call)
        else:
            member.queued.append(call)
        call.future = self._listen(member, call, member.actor.evaluate.remote(call.candidates))
        self._place(member)

    def _start(self, member: _Member, call: _Call) -> None:
        call.started = time.monotonic()
        member.running[call] = None

    def _finish(self, member: _Member, call: _Call) -> None:
        member.running.pop(call, None)
        if call in member.queued:  # Actors with threads may finish out of order.
            member.queued.remove(call)
        while member.queued and len(member.running) < self._concurrency:
            self._start(member, member.queued.popleft())
        self._place(member)

    def _place(self, member: _Member) -> None:
        for places in self._free:
            places.pop(member, None)
        if member.calls < 2 * self._concurrency:
            level = 0 if not member.calls else 1 if member.calls < self._concurrency else 2
            self._free[level][member] = None

    def _welcome(self, member: _Member, future: "Future[Any]") -> None:
        error = future.exception()
        if error is None:
            member.pid = future.result()
            self._ready += 1
            self._deaths_at_start = 0
            self._failed_to_start = False
            self._place(member)
            return
        # Before `prepare` runs, an actor may fail to unpickle `build`: so would its replacements. Once is forgiven, as
        # an import may fail where a thread of Ray's own imports the same module at that moment.
        if not isinstance(error, _LOST) or (isinstance(error, RayActorError) and error.actor_init_failed):
            message = f"a worker could not be set up: {told(error)}"
            if self._failed_to_start or isinstance(getattr(error, "cause", None), LopError):
                raise LopError(message) from error
            log.warning("%s; another takes its place", message)
            self._failed_to_start = True
            self._dismiss(member)
            return
        log.warning("a worker died before it was ready: another takes its place")
        if not _went_with_its_machine(error):
            self._deaths_at_start += 1
        if self._deaths_at_start > ATTEMPTS * min(self._count, 10):
            how = f"{self._deaths_at_start} workers in a row died before they could evaluate anything"
            raise LopError(f"{how}: {told(error)}") from error
        self._dismiss(member)

    def _receive(self, member: _Member, call: _Call, future: "Future[Any]", results: Results) -> None:
        error = future.exception()
        if error is None:
            self._finish(member, call)
            answers = cast(Sequence[Answer], future.result())
            for candidate, answer in zip(call.candidates, answers, strict=True):
                self._take(member, candidate, answer, results)
            if not member.gone and not member.calls and not self._waiting and len(self._members) > self._wanted:
                self._dismiss(member)
        elif isinstance(error, _LOST):
            self._bury(member, error)
        else:  # It never came to `evaluate`, or its answer could not be sent.
            self._finish(member, call)
            for candidate in call.candidates:
                self._take(member, candidate, Answer(None, told(error), 0.0), results)

    def _take(self, member: _Member, candidate: Candidate, answer: Answer, results: Results) -> None:
        if answer.evaluation is None:
            self._failed(member, candidate, answer.error)
            return
        self._blame.succeeded(candidate, member)
        is_first = math.isinf(self._mean_seconds)
        self._mean_seconds = answer.seconds if is_first else 0.95 * self._mean_seconds + 0.05 * answer.seconds
        self._alone.discard(candidate)
        results.append((candidate.allocation, answer.evaluation))
        self._release_given_up(results)

    def _failed(self, member: _Member, candidate: Candidate, reason: str) -> None:
        """An allocation failed on an actor: either may be at fault."""
        log.warning("evaluation of %s failed: %s", candidate.allocation.widths, reason)
        if self._blame.failed(candidate, member, reason):
            self._waiting.appendleft(candidate)
        else:
            self._alone.discard(candidate)
        if not member.gone and self._blame.is_at_fault(member):
            log.warning("a worker fails at everything while others do not: another takes its place")
            self._dismiss(member)

    def _release_given_up(self, results: Results) -> None:
        for candidate, reason in self._blame.release().items():
            log.warning("allocation %s is recorded as failed: %s", candidate.allocation.widths, reason)
            results.append((candidate.allocation, Evaluation.failed(reason, candidate)))

    def _bury(self, member: _Member, error: BaseException) -> None:
        """An actor died: what it was doing may have killed it."""
        log.warning("a worker died: another takes its place, and its %d calls", member.calls)
        running = next(iter(member.running), None)
        self._dismiss(member)
        if running is None or _went_with_its_machine(error):
            return
        self._blame.died()
        candidate = self._suspect(running)
        if candidate is None:
            return
        if self._blame.killed(candidate):
            # Last in line, so that others show meanwhile whether workers die of themselves.
            self._waiting.append(candidate)
        else:
            self._alone.discard(candidate)

    def _suspect(self, call: _Call) -> Candidate | None:
        """A dismissed actor's call's only candidate, out of line; several are first sent alone, to tell which."""
        if len(call.candidates) > 1:
            self._alone.update(call.candidates)
            return None
        (candidate,) = call.candidates
        self._waiting.remove(candidate)
        return candidate

    def _check(self, results: Results) -> None:
        """What must be looked for, because no actor says it."""
        now = time.monotonic()
        if now - self._checked >= _SECONDS_BETWEEN_CHECKS:
            self._checked = now
            for member in list(self._members):
                oldest = next(iter(member.running), None)
                if oldest and now - oldest.started > self._seconds:
                    self._end_stuck(member, oldest)
            self._recruit()
            self._dispatch()
        if self._blame.has_given_up and not self._waiting and not any(member.calls for member in self._members):
            self._release_given_up(results)  # The search would wait for them for ever.
        if not self._ready:
            self._wait.remind()

    def _end_stuck(self, member: _Member, call: _Call) -> None:
        log.warning("a worker has been at one evaluation for more than %g s: another takes its place", self._seconds)
        self._dismiss(member)
        candidate = self._suspect(call)
        if candidate is not None:
            self._failed(member, candidate, f"it took longer than {self._seconds:g} s")


def _went_with_its_machine(error: BaseException) -> bool:
    is_gone = isinstance(error, (ActorUnavailableError, NodeDiedError, ObjectLostError))
    return is_gone or getattr(error, "preempted", False) or "node has died" in str(error).lower()
