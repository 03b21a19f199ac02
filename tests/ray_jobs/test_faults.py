"""A cluster of several nodes that loses nodes, actors and drivers: the search ends as if nothing had happened."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from lop.search.evaluation import Evaluation
from lop.search.ledger import Ledger, read_ledger
from lop.search.loop import InProcess, run_search
from lop.search.racing import Candidate
from lop.space.allocation import Allocation
from lop.storage.location import Location
from ray_jobs.fleet import Fleet
from tests.lop.search.test_loop import make_trees, outcome
from tests.ray_jobs.evaluators import ERRORS, SECONDS, CalmlyTroubled, Logged, Troubled
from tests.ray_jobs.waiting import wait_for

Driver = subprocess.Popen[bytes]
Outcome = tuple[list[object], list[tuple[Allocation, Evaluation]]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes of two."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def calmly(folder: Path, evaluator: Any, *, count: int = 3) -> Outcome:
    trees = dict(list(make_trees().items())[:count])
    with Ledger(folder, {}) as ledger:
        run_search(trees.values(), InProcess(evaluator), ledger)
    return outcome(trees), sorted(read_ledger(folder))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("calm")
    return calmly(folder / "ledger", Logged(folder / "log", 0))


def test_a_node_that_goes_changes_nothing(cluster: Cluster, calm: Outcome, tmp_path: Path) -> None:
    trees, logged = make_trees(), tmp_path / "log"
    node = next(iter(cluster.worker_nodes))

    def disturb() -> None:
        wait_for(lambda: logged.exists() and logged.stat().st_size > 300, "the first evaluations")
        cluster.remove_node(node, allow_graceful=False)

    disturbing = threading.Thread(target=disturb)
    with Fleet(partial(Logged, logged, 0.1), count=4) as fleet, Ledger(tmp_path / "ledger", {}) as ledger:
        disturbing.start()
        run_search(trees.values(), fleet, ledger)
    disturbing.join()
    cluster.add_node(num_cpus=2)
    assert (outcome(trees), sorted(read_ledger(tmp_path / "ledger"))) == calm


def test_a_driver_killed_three_times_repeats_nothing_that_was_recorded(
    cluster: Cluster, calm: Outcome, tmp_path: Path
) -> None:
    killed_and_resumed(str(tmp_path / "ledger"), tmp_path, calm, lambda: cluster.address, [subprocess.Popen.kill] * 3)


def test_another_head_takes_up_from_a_bucket_what_was_begun_on_one_that_is_lost(
    calm: Outcome, tmp_path: Path, bucket: str
) -> None:
    node = {"num_cpus": 3, "include_dashboard": False}
    heads = [Cluster(initialize_head=True, head_node_args=node)]

    def lose_head(driver: Driver) -> None:
        heads[-1].head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        driver.kill()  # It is on the same machine.
        heads.append(Cluster(initialize_head=True, head_node_args=node))

    killed_and_resumed(bucket.format("lost/ledger"), tmp_path, calm, lambda: heads[-1].address, [lose_head])
    heads[-1].shutdown()


def killed_and_resumed(
    ledger: str, folder: Path, calm: Outcome, address: Callable[[], str], kills: Sequence[Callable[[Driver], None]]
) -> None:
    """Runs one search again and again, each time to be killed at a random moment, and at last to its end.

    The ledger, a folder or a URI, is read meanwhile.
    """
    logged, result = folder / "log", folder / "outcome"
    command = [sys.executable, "-m", "tests.ray_jobs.driver", ledger, str(logged), str(result)]
    recorded: set[str] = set()
    moments = random.Random(0)
    for kill in kills:
        environment = {**os.environ, "RAY_ADDRESS": address()}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as driver:
            more = len(recorded) + moments.randint(5, 25)
            wait_for(partial(_has_grown, driver, ledger, more), "a ledger that grows")
            assert driver.poll() is None, driver.stderr.read() if driver.stderr else ""
            kill(driver)
        before = len(logged.read_text().splitlines())
        recorded = {"-".join(map(str, allocation.widths)) for allocation, _ in read_ledger(ledger)}
        time.sleep(0.5)  # For what the actors of the killed driver had begun.
    environment = {**os.environ, "RAY_ADDRESS": address()}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=200)
    assert sorted(read_ledger(ledger)) == calm[1]
    assert result.read_text() == repr(calm[0])
    again = logged.read_text().splitlines()[before:]
    assert not recorded & set(again)


def test_a_torn_last_record_is_evaluated_again(cluster: Cluster, calm: Outcome, tmp_path: Path) -> None:
    folder, logged = tmp_path / "ledger", tmp_path / "log"
    calmly(folder, Logged(logged, 0))
    newest = max(folder.iterdir())
    newest.write_bytes(newest.read_bytes()[:-20])
    logged.unlink()
    trees = make_trees()
    with Fleet(partial(Logged, logged, 0), count=2) as fleet, Ledger(folder, {}) as ledger:
        run_search(trees.values(), fleet, ledger)
    assert (outcome(trees), sorted(read_ledger(folder))) == calm
    assert len(logged.read_text().splitlines()) == 1


def test_what_cannot_be_evaluated_is_recorded_with_its_error(cluster: Cluster, tmp_path: Path) -> None:
    trees = dict(list(make_trees().items())[:1])
    with Fleet(Troubled, count=3, seconds=SECONDS) as fleet, Ledger(tmp_path / "ledger", {}) as ledger:
        run_search(trees.values(), fleet, ledger)
    found = outcome(trees), sorted(read_ledger(tmp_path / "ledger"))
    assert found == calmly(tmp_path / "calm", CalmlyTroubled(), count=1)
    assert {evaluation.error for _, evaluation in found[1]} == {"", *ERRORS.values()}
    assert all(not tree.best[1].error for tree in trees.values())


def test_actors_that_nothing_is_left_for_are_given_back(cluster: Cluster, tmp_path: Path) -> None:
    with Fleet(partial(Logged, tmp_path / "log", 0), count=4) as fleet:
        fleet.expect(12)
        wait_for(lambda: not fleet.collect(0.1) and fleet.alive == 4, "four actors")
        fleet.expect(2)
        assert fleet.alive == 2
        fleet.submit(Candidate(Allocation((64, 64, 64, 64, 64))))
        while not fleet.collect(1):
            pass
        fleet.expect(0)
        assert fleet.alive == 0
        wait_for(lambda: ray.available_resources().get("CPU", 0) == 4, "the actors' CPUs")


def _has_grown(driver: Driver, ledger: str, count: int) -> bool:
    """Whether a ledger, which may not be there yet, holds so many evaluations; or its driver has ended."""
    is_there = any(name.endswith(".jsonl") for name in Location.parse(ledger).files())
    return (is_there and len(list(read_ledger(ledger))) >= count) or driver.poll() is not None
