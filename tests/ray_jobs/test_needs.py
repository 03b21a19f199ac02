"""Workers that can never be had are refused at once, and those that may yet come are waited for aloud."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from lop.errors import LopError
from lop.model.find import assets
from lop.run.building import Materials
from lop.run.compute import on_worker
from lop.run.config import Config, find_config, load_config
from lop.run.run import Run
from lop.storage.location import Location
from ray_jobs import needs
from ray_jobs.compute import OnRay
from ray_jobs.evaluators import evaluator_fleet
from ray_jobs.fleet import Fleet
from ray_jobs.needs import Needs
from tests.lop.search.test_loop import make_trees


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and no autoscaler."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def config(**values: Any) -> Config:
    return load_config(find_config("tiny"), workers=2, **values)


def _fleet(config: Config, folder: Path) -> None:
    run = Run(config, assets() / "run")
    with evaluator_fleet(Materials.of(run), run.samples.reward):
        pass


def _pool(config: Config, folder: Path) -> None:
    list(OnRay().map(lambda: abs, [1, 2], config))


def _on_worker(config: Config, folder: Path) -> None:
    on_worker(lambda run: run.folder, Run(config, folder), OnRay())


def _tune(config: Config, folder: Path) -> None:
    OnRay().tune(lambda item: (0.0, item), {"one": 1}, Location.parse(folder), progress=False)


@pytest.mark.parametrize(
    ("start", "settings", "lacks", "remedy"),
    [
        (_fleet, {"gpus_per_worker": 1}, "1 CPU and 1 GPU", "gpus_per_worker=0"),
        (_pool, {"gpus_per_worker": 0.5}, "1 CPU and 0.5 GPU", "gpus_per_worker=0"),
        (_on_worker, {"gpus_per_worker": 1}, "1 CPU and 1 GPU", "gpus_per_worker=0"),
        (_fleet, {"threads": 64}, "64 CPU and 0 GPU", "threads=1"),
        (_tune, {}, "1 CPU and 0 GPU", "--workers 0"),
    ],
)
def test_workers_that_can_never_be_had_are_refused(
    cluster: Cluster,
    tmp_path: Path,
    start: Callable[[Config, Path], None],
    settings: dict[str, Any],
    lacks: str,
    remedy: str,
) -> None:
    with pytest.raises(LopError) as refusal:
        start(config(**settings), tmp_path)
    for text in (lacks, remedy, "--workers 0"):
        assert text in str(refusal.value)
    assert ("threads=1" in str(refusal.value)) == ("threads" in settings)


def test_workers_that_an_autoscaler_might_bring_are_waited_for_aloud(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_NODE_TYPE_NAME", "small")  # As `ray up` and KubeRay do.
    monkeypatch.setattr(needs, "_SECONDS_OF_SILENCE", 0)
    node = cluster.add_node(num_cpus=1)
    demand = Needs(cpus=1, gpus=1)
    demand.check()
    with caplog.at_level(logging.WARNING), Fleet(_never, count=1, needs=demand) as fleet:
        (tree, *_) = make_trees().values()
        fleet.submit(tree.advance()[0])
        assert fleet.collect(1.5) == []
    cluster.remove_node(node)
    assert "each needs 1 CPU and 1 GPU; the cluster has 1 CPU and 0 GPU" in caplog.text


def _never() -> Any:
    raise AssertionError


@pytest.mark.timeout(900)
def test_a_pipeline_ends_on_a_cluster_with_one_gpu_and_one_cpu(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(assets() / "run" / "statistics.safetensors", run)
    settings = (
        *("search.targets={first: 0.4, last: 0.6, step: 0.1}", "search.evaluations=2", "search.simulations=2"),
        *("search.roots=[flap]", "train.epochs=1", "train.architectures=[mlp]"),
        *("compare.targets=[0.5]", "compare.recoveries=[]", "tables.targets=[0.5]", "tables.limit=1"),
        *("tables.baselines=[uniform]", "tables.rivals=[random]", "gpus_per_worker=1"),
    )
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "ray_jobs.pipeline", "--config", "tiny", "--run", run, "--workers", "2", *options]
    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    try:
        environment = {**os.environ, "RAY_ADDRESS": head.address}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    finally:
        head.shutdown()
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "tables.json").read_text())["values"]
    assert (run / "report.md").exists()
