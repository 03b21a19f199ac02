"""What the search's driver costs, with evaluators that sleep instead of computing: `python benchmarks/driver.py`.

- `busy_share`: of 1,000 logical workers (threads of a few actor processes, each one evaluation at a time) that all
  trees together keep busy, over a search with evaluations of 20 s.
- `commits_per_second`: of evaluations that take no time, on two actors, median of rounds.
- `two_worker_speedup`: evaluations per second of the embedded model on two actors against one, a thread each.
- `replay_seconds`: for opening a ledger of 10,000 evaluations and taking a search through it.
- `trees`: by their number, the driver's CPU and memory, and the search's own milliseconds for an evaluation.

Prints tables, and as the last line the same as JSON. `--quick` shortens everything, for a look whether it runs.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import ray

from lop.run.building import Materials
from lop.run.config import find_config, load_config
from lop.run.run import shipped_run
from lop.search.evaluation import Evaluation
from lop.search.ledger import Ledger
from lop.search.loop import Workers, run_search
from lop.search.racing import Candidate
from lop.search.tree import SearchTree, TreeOptions
from lop.space.allocation import Allocation, Space, uniform
from ray_jobs.evaluators import evaluator_fleet
from ray_jobs.fleet import Fleet
from ray_jobs.needs import Needs

SPACE = Space(28, 18_944, 128, 0.95)  # The 7B's.
RAY = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}


class Sleeps:
    """Answers after `seconds` with a number that depends on the allocation alone."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def evaluate(self, candidate: Candidate) -> Evaluation:
        """A made-up result."""
        allocation = candidate.allocation
        if self._seconds:
            time.sleep(self._seconds)
        return answer(allocation)


class Counting:
    """A search's watcher that notes how many allocations were committed, and when."""

    def __init__(self) -> None:
        self.done = 0
        self.times: list[tuple[float, int]] = []
        self._counts: dict[int, int] = {}

    def advanced(self, tree: SearchTree) -> None:
        """A tree has committed results."""
        self.done += len(tree.results) - self._counts.get(tree.budget, 0)
        self._counts[tree.budget] = len(tree.results)

    def tick(self, workers: Workers) -> None:
        """A round is over."""
        self.times.append((time.monotonic(), self.done))


class AtOnce:
    """Workers in this process that cost nothing but the arithmetic of a result."""

    capacity = 1 << 20
    alive = 1

    def __init__(self) -> None:
        self._waiting: deque[Candidate] = deque()

    def expect(self, most: int) -> None:
        """There is nothing to scale."""

    def submit(self, candidate: Candidate) -> None:
        """Takes an allocation."""
        self._waiting.append(candidate)

    def collect(self, seconds: float) -> list[tuple[Allocation, Evaluation]]:
        """Answers all."""
        results = [(candidate.allocation, answer(candidate.allocation)) for candidate in self._waiting]
        self._waiting.clear()
        return results


def answer(allocation: Allocation) -> Evaluation:
    """A made-up result, the better the more the first layers keep."""
    value = sum(width * (29 - layer) for layer, width in enumerate(allocation.widths)) / (435 * SPACE.neurons)
    return Evaluation(round(value, 3), value - 1)


def make_trees(
    count: int, *, simulations: int = 300, evaluations: int = 300, window: int = 2
) -> dict[float, SearchTree]:
    """Trees of the paper's size, at targets from 5% to 70%."""
    options = TreeOptions(
        simulations=simulations, evaluations=evaluations, exploration=0.02, step=0.3, decay=0.8, children=6, depth=12,
        window=window,
    )  # fmt: skip
    targets = [round(0.05 + 0.65 * index / max(1, count - 1), 6) for index in range(count)]
    return {
        target: SearchTree(
            SPACE,
            [uniform(SPACE, SPACE.budget(target))],
            options,
            seed=(0, SPACE.budget(target)),
            reward=lambda result: result.accuracy,
        )
        for target in targets
    }


@contextmanager
def _folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="lop-driver-") as name:
        yield Path(name)


def busy_share(workers: int, seconds: float, rounds: int) -> dict[str, float]:
    """Keeps logical workers busy for some rounds of evaluations; a round takes as long as one evaluation."""
    threads = min(250, workers)
    # Two evaluations for each worker in flight, as on a cluster: one runs and one waits.
    trees = make_trees(50, simulations=10**6, evaluations=2 * workers * rounds // 50, window=2 * workers // 50)
    counting = Counting()
    with (
        _folder() as folder,
        Fleet(partial(Sleeps, seconds), count=workers // threads, needs=Needs(cpus=0), concurrency=threads) as fleet,
        Ledger(folder / "ledger", {}) as ledger,
    ):
        cpu, start = time.process_time(), time.monotonic()
        run_search(trees.values(), fleet, ledger, watcher=counting)
        cpu, wall = time.process_time() - cpu, time.monotonic() - start
    # From when the first evaluations began, to the end: trees that run out count as idleness.
    began = next(moment for moment, done in counting.times if done) - seconds
    wall_busy = counting.times[-1][0] - began
    return {
        "busy_share": counting.done * seconds / (workers * wall_busy),
        "busy_evaluations_per_second": counting.done / wall_busy,
        "busy_driver_cores": cpu / wall,
    }


def commits_per_second(trees: int, rounds: int, simulations: int) -> list[float]:
    """Evaluations that take no time, committed per second, over whole searches on two actors that are ready."""
    found = []
    for _ in range(rounds):
        counting = Counting()
        with (
            _folder() as folder,
            Fleet(partial(Sleeps, 0.0), count=2) as fleet,
            Ledger(folder / "ledger", {}) as ledger,
        ):
            run_search(make_trees(trees, simulations=simulations).values(), fleet, ledger, watcher=counting)
        first, last = next(entry for entry in counting.times if entry[1]), counting.times[-1]
        found.append((last[1] - first[1]) / (last[0] - first[0]))
    return found


def two_worker_speedup(rounds: int, evaluations: int) -> dict[str, float]:
    """Evaluations per second of the embedded model on one and on two actors, alternating."""
    run = shipped_run(load_config(find_config("tiny")))
    assert run is not None
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count in rates:
            config = run.config.model_copy(update={"workers": count, "threads": 1})
            with evaluator_fleet(replace(Materials.of(run), config=config), run.samples.reward) as fleet:
                candidates = [Candidate(uniform(run.space, run.space.budget(0.3)))] * (count * evaluations)
                while fleet.alive < count:  # An actor that comes up meanwhile would be counted as a whole one.
                    _rate(fleet, candidates[:count])
                rates[count].append(_rate(fleet, candidates))
    one, two = (statistics.median(rates[count]) for count in (1, 2))
    return {"two_worker_speedup": two / one, "one_worker_per_second": one, "two_workers_per_second": two}


def _rate(fleet: Fleet, candidates: list[Candidate]) -> float:
    fleet.expect(len(candidates))
    start, done = time.perf_counter(), 0
    for candidate in candidates:
        fleet.submit(candidate)
    while done < len(candidates):
        done += len(fleet.collect(1.0))
    return done / (time.perf_counter() - start)


def replay_seconds(evaluations: int) -> float:
    """Opening a ledger and taking the search through it, with nothing evaluated anew."""
    count = 40
    with _folder() as folder:
        sizes = {"simulations": evaluations // count, "evaluations": evaluations // count}
        with Ledger(folder / "ledger", {}) as ledger:
            run_search(make_trees(count, **sizes).values(), AtOnce(), ledger)
        trees, counting = make_trees(count, **sizes), Counting()
        start = time.perf_counter()
        with Ledger(folder / "ledger", {}) as ledger:
            run_search(trees.values(), _Nobody(), ledger, watcher=counting)
        seconds = time.perf_counter() - start
        assert counting.done == len(ledger)
        return seconds


class _Nobody(AtOnce):
    def submit(self, candidate: Candidate) -> None:
        raise AssertionError("what the ledger holds is not evaluated again")


def by_trees(counts: list[int], simulations: int) -> list[dict[str, float]]:
    """The driver alone: what trees and ledger cost without Ray."""
    rows = []
    for count in counts:
        with _folder() as folder, Ledger(folder / "ledger", {}) as ledger:
            trees, counting = make_trees(count, simulations=simulations), Counting()
            before, cpu, start = psutil.Process().memory_info().rss, time.process_time(), time.perf_counter()
            run_search(trees.values(), AtOnce(), ledger, watcher=counting)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - start
            grown = max(0, psutil.Process().memory_info().rss - before)
        rows.append(
            {
                "trees": count,
                "evaluations": counting.done,
                "ms_per_evaluation": 1000 * wall / counting.done,
                "cpu_ms_per_evaluation": 1000 * cpu / counting.done,
                "memory_mib": grown / 2**20,
            }
        )
    return rows


def _measure_trees(quick: bool) -> dict[str, Any]:
    rows = by_trees([1, 8, 64], simulations=30 if quick else 300)
    _print_rows(rows)
    return {"trees": rows}


def _measure_replay(quick: bool) -> dict[str, Any]:
    seconds = replay_seconds(10_000)
    print(f"replay of 10,000 evaluations: {seconds:.2f} s")
    return {"replay_seconds": seconds}


def _measure_commits(quick: bool) -> dict[str, Any]:
    rates = commits_per_second(64, rounds=1 if quick else 5, simulations=60 if quick else 300)
    median = statistics.median(rates)
    print(f"commits per second: {median:.0f} ({min(rates):.0f} to {max(rates):.0f})")
    return {"commits_per_second": median, "commits_per_second_rounds": rates}


def _measure_speedup(quick: bool) -> dict[str, Any]:
    found = two_worker_speedup(rounds=1 if quick else 3, evaluations=6 if quick else 30)
    print(f"two workers against one: {found['two_worker_speedup']:.2f} times")
    return found


def _measure_busy(quick: bool) -> dict[str, Any]:
    workers, seconds, rounds = (100, 2.0, 5) if quick else (1000, 20.0, 6)
    found = busy_share(workers, seconds, rounds)
    print(f"{workers} workers, evaluations of {seconds:g} s: {found['busy_share']:.1%} busy")
    return found | {"busy_workers": workers, "busy_seconds": seconds}


_MEASURES = {
    "trees": _measure_trees,
    "replay": _measure_replay,
    "commits": _measure_commits,
    "speedup": _measure_speedup,
    "busy": _measure_busy,
}


def main() -> None:
    """Measures all of it."""
    parser = argparse.ArgumentParser(description="What the search's driver costs.")
    parser.add_argument("--quick", action="store_true", help="a hundred workers, evaluations of 2 s, one round")
    parser.add_argument("--only", nargs="+", choices=_MEASURES, default=list(_MEASURES), help="these alone")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    result: dict[str, Any] = {"benchmark": "driver", "cores": os.cpu_count()}
    ray.init(address="local", num_cpus=2, **RAY)
    for name in options.only:
        result |= _MEASURES[name](options.quick)
    ray.shutdown()
    result["driver_peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(result))


def _print_rows(rows: list[Mapping[str, float]]) -> None:
    print("  ".join(f"{name:>21}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>21.4g}" for value in row.values()))


if __name__ == "__main__":
    main()
