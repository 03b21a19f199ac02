"""How far a search is: for the terminal, for logs, for `lop watch` and for metrics."""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from lop.search.loop import Workers
from lop.search.tree import SearchTree
from lop.space.allocation import Space
from lop.storage.location import Location
from lop.terminal import duration

log = logging.getLogger(__name__)
STATUS_FILE = "status.json"
_SECONDS_OF_MEMORY = 120.0


@dataclass(frozen=True)
class TargetProgress:
    """One tree's part: `best` is its best reward so far and `ratios` that allocation, None before the first."""

    target: float
    done: int
    planned: int
    best: float | None
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class Progress:
    """A search at one moment.

    Attributes:
        time: seconds since the epoch.
        done, planned: evaluations, of the scan before the trees and in them; a tree that ends early plans no more.
        per_second: evaluations, over the last two minutes of this process.
        seconds_left: at that rate; None where nothing has been evaluated yet.
        workers: that can evaluate now.
        reward: what the trees maximise.
        targets: each tree's part.
    """

    time: float
    done: int
    planned: int
    per_second: float
    seconds_left: float | None
    workers: int
    reward: str
    targets: tuple[TargetProgress, ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Progress":
        """The inverse of `dataclasses.asdict`, by way of JSON."""
        targets = tuple(TargetProgress(**{**entry, "ratios": tuple(entry["ratios"])}) for entry in data["targets"])
        return cls(**{**data, "targets": targets})


Sink = Callable[[Progress], None]


class SearchProgress:
    """Follows a search, and tells its sinks at most as often as each wants to know (`lop.search.loop.Watcher`).

    Args:
        sinks: (seconds between two calls, whom to call).
    """

    def __init__(
        self, trees: Mapping[float, SearchTree], space: Space, reward: str, sinks: Sequence[tuple[float, Sink]]
    ) -> None:
        self._trees = trees
        self._space = space
        self._reward = reward
        self._sinks = sinks
        self._next = [time.monotonic() + seconds for seconds, _ in sinks]
        self._targets = {tree.budget: target for target, tree in trees.items()}
        self._parts: dict[float, TargetProgress] = {}
        self._prepared: dict[str, tuple[int, int]] = {}
        self._changed = set(trees)
        self._memory: deque[tuple[float, int]] = deque()

    def advanced(self, tree: SearchTree) -> None:
        """A tree has committed results."""
        self._changed.add(self._targets[tree.budget])

    def prepared(self, step: str, done: int, planned: int) -> None:
        """So many of the evaluations of a step that comes before the trees are done."""
        self._prepared[step] = (done, planned)

    def tick(self, workers: Workers) -> None:
        """Tells the sinks whose time has come."""
        now = time.monotonic()
        if not self._memory:  # What an earlier process did is no speed of this one.
            self._rate(self._before[0] + sum(len(tree.results) for tree in self._trees.values()))
        if now < min(self._next, default=math.inf):
            return
        progress = self.snapshot(workers)
        for index, (seconds, sink) in enumerate(self._sinks):
            if now >= self._next[index]:
                self._next[index] = now + seconds
                sink(progress)

    def finish(self, workers: Workers) -> None:
        """Tells every sink how it ended."""
        progress = self.snapshot(workers)
        for _, sink in self._sinks:
            sink(progress)

    def snapshot(self, workers: Workers) -> Progress:
        """The search now."""
        for target in self._changed:
            self._parts[target] = self._part(target)
        self._changed.clear()
        parts = tuple(self._parts[target] for target in self._trees)
        done, planned = self._before
        done, planned = done + sum(part.done for part in parts), planned + sum(part.planned for part in parts)
        rate = self._rate(done)
        left = 0.0 if done >= planned else (planned - done) / rate if rate else None
        return Progress(time.time(), done, planned, rate, left, workers.alive, self._reward, parts)

    @property
    def _before(self) -> tuple[int, int]:
        """The evaluations that come before the trees: done, and in all."""
        return sum(done for done, _ in self._prepared.values()), sum(planned for _, planned in self._prepared.values())

    def _part(self, target: float) -> TargetProgress:
        tree = self._trees[target]
        done, planned = len(tree.results), len(tree.results) if tree.done else tree.limit
        if not tree.results:
            return TargetProgress(target, done, planned, None, ())
        allocation, evaluation = tree.best
        return TargetProgress(target, done, planned, evaluation.worth(self._reward), allocation.ratios(self._space))

    def _rate(self, done: int) -> float:
        now = time.monotonic()
        while len(self._memory) > 1 and now - self._memory[1][0] > _SECONDS_OF_MEMORY:
            self._memory.popleft()
        self._memory.append((now, done))
        since, before = self._memory[0]
        return (done - before) / (now - since) if now > since else 0.0


def log_sink(progress: Progress) -> None:
    """One line that reads well in a job's log."""
    rewards = [f"{100 * t.target:g}%: {t.best:.4g}" for t in progress.targets if t.best is not None]
    log.info(
        "search: %d of %d evaluations, %.3g per second, %s left, %d workers; best %s by target: %s",
        progress.done,
        progress.planned,
        progress.per_second,
        duration(progress.seconds_left),
        progress.workers,
        progress.reward.replace("_", " "),
        ", ".join(rewards) or "none yet",
    )


def status_sink(location: Location) -> Sink:
    """Writes `status.json`, which `lop watch` shows; a search goes on without it where it cannot be written."""

    def write(progress: Progress) -> None:
        try:
            location.write(STATUS_FILE, json.dumps(asdict(progress)).encode())
        except OSError as error:
            log.warning("%s/%s cannot be written: %s", location, STATUS_FILE, error)

    return write


def bar_sink(bar: "tqdm[Any]") -> Sink:
    """Moves a bar on a terminal."""

    def update(progress: Progress) -> None:
        bar.total = progress.planned
        bar.set_postfix(workers=progress.workers, refresh=False)
        bar.update(progress.done - bar.n)

    return update
