"""A search as a job, on a head that has no workers until somebody asks for them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.autoscaler._private.monitor import BASE_READONLY_CONFIG
from ray.util.state import list_nodes

from lop.model.find import assets
from lop.run.config import find_config, load_config
from lop.run.run import Run
from lop.search.ledger import read_ledger
from lop.stages.local import Local
from lop.stages.search import search_stage
from tests.ray_jobs.waiting import wait_for

ROOT = Path(__file__).parents[2]
SETTINGS = (
    *("search.targets={first: 0.3, last: 0.5, step: 0.1}", "search.evaluations=4", "search.simulations=6"),
    *("search.roots=[flap, sensitivity]", "search.sensitivity_levels=1"),
)


@dataclass(frozen=True)
class Head:
    """Addresses of a head node: for drivers, for jobs and questions, and for Prometheus."""

    gcs: str
    dashboard: str
    metrics: str

    def published(self) -> dict[str, float]:
        """The search's numbers, as Prometheus would scrape them; none while the head has none."""
        try:
            with urlopen(self.metrics, timeout=5) as page:
                lines = page.read().decode().splitlines()
        except OSError:
            return {}
        values = [re.fullmatch(r"ray_(lop_\w+)\{.*\} (\S+)", line) for line in lines]
        return {found[1]: float(found[2]) for found in values if found}

    def workers(self) -> int:
        """Nodes beside the head that are alive."""
        return len([n for n in list_nodes(self.dashboard, limit=50) if n.state == "ALIVE"]) - 1


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head without CPUs whose autoscaler may start up to three nodes of one CPU on this machine."""
    folder = tmp_path_factory.mktemp("head")
    short = tempfile.mkdtemp()  # The paths of sockets hold 107 characters, which pytest's folders leave few of.
    gcs, dashboard, agent, metrics = _free_ports(4)
    config = {
        **BASE_READONLY_CONFIG,
        "cluster_name": "fake",
        "max_workers": 3,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": f"127.0.0.1:{gcs}",
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
        },
        "head_node_type": "ray.head.default",
    }
    (folder / "autoscaling.json").write_text(json.dumps(config))
    environment = {
        **os.environ,
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_metrics_report_interval_ms": "500",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": "ray.head.default",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "PYTHONPATH": str(ROOT),
    }
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"),
        f"--autoscaling-config={folder / 'autoscaling.json'}",
        *("--node-ip-address=127.0.0.1", f"--port={gcs}", "--include-dashboard=true", f"--dashboard-port={dashboard}"),
        *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"),
        *("--disable-usage-stats", f"--temp-dir={short}"),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    found = Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{metrics}/metrics")
    try:
        wait_for(lambda: _answers(found), "a head that answers", seconds=120)
        yield found
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(short, ignore_errors=True)


def test_a_job_makes_nodes_appear_uses_them_and_lets_them_go(head: Head, tmp_path: Path) -> None:
    run = tmp_path / "job"
    run.mkdir()
    shutil.copy(assets() / "run" / "statistics.safetensors", run)
    assert head.workers() == 0
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard),
        *("--working-dir", str(ROOT), "--", sys.executable, "-m", "ray_jobs.search"),
        *("--config", "tiny", "--run", str(run), "--workers", "2", *settings),
    ]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen, published = 0, dict[str, float]()
    while job.poll() is None:
        seen = max(seen, head.workers())
        published |= head.published()
        time.sleep(0.5)
    printed = job.stdout.read() if job.stdout else ""
    assert job.returncode == 0, printed
    assert 1 <= seen <= 2
    assert "search: 24 of 24 evaluations" in printed
    assert "\r" not in printed
    names = ("evaluations_done", "evaluations_planned", "evaluations_per_second", "workers_alive", "best_reward")
    assert {f"lop_{name}" for name in names} <= set(published)
    assert published["lop_evaluations_planned"] == 24  # 12 layers alone, and 3 targets of 4
    assert -1 < published["lop_best_reward"] < 0  # Nats.
    wait_for(lambda: head.workers() == 0, "the nodes to go", seconds=120)

    calm = Run(load_config(find_config("tiny"), SETTINGS), tmp_path / "calm")
    calm.folder.mkdir()
    shutil.copy(run / "statistics.safetensors", calm.folder)
    search_stage(calm, Local(), progress=False)
    assert sorted(read_ledger(run / "ledger")) == sorted(read_ledger(calm.ledger))
    assert json.loads((run / "search.json").read_text()) == json.loads(calm.search_file.read_text())


def test_a_job_whose_files_would_be_gone_with_it_is_refused(head: Head) -> None:
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard),
        *("--working-dir", str(ROOT), "--", sys.executable, "-m", "ray_jobs.pipeline", "--config", "tiny"),
    ]
    done = subprocess.run([*command, "--run", "runs/job"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "lop: --run runs/job is relative, and a Ray job's working directory is gone with the job" in done.stdout


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for found in sockets:
        found.bind(("127.0.0.1", 0))
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


def _answers(head: Head) -> bool:
    try:
        return head.workers() >= 0
    except Exception:
        return False
