"""A distillation as a job: it runs where the GPUs are, and its driver holds none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

import lop
from lop.checkpoint.export import verify
from lop.model.samples import SampleSets
from tests.lop.distil.conftest import QUICK, write


@pytest.mark.parametrize("gpus", [0, 1])
def test_it_learns_on_a_worker_with_a_gpu(gpus: int, samples: SampleSets, tmp_path: Path) -> None:
    lop.prune("tiny", tmp_path / "pruned", ratio=0.8, recovery="none")
    for name in ("calibration", "reward", "test"):
        write(tmp_path / "few" / f"{name}.parquet", getattr(samples, name)[::60])
    settings = (*QUICK, f"samples={tmp_path / 'few'}", "gpus_per_worker=1", "device=cpu")
    command = [
        *(sys.executable, "-m", "ray_jobs.distil", tmp_path / "pruned", "--out", tmp_path / "out"),
        *("--work", tmp_path / "work", "--workers", "1"),
        *(part for setting in settings for part in ("--set", setting)),
    ]
    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": gpus, "include_dashboard": False})
    try:
        environment = {**os.environ, "RAY_ADDRESS": head.address}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    finally:
        head.shutdown()
    said = done.stdout + done.stderr
    if not gpus:
        assert done.returncode == 2
        assert "lop: a worker needs 1 CPU and 1 GPU, which no machine here has (1 CPU and 0 GPU)" in said
        assert not (tmp_path / "out").exists()
        return
    assert done.returncode == 0, said
    assert any("_Worker pid=" in line and "distil: step" in line for line in said.splitlines()), said
    (record,) = verify(tmp_path / "out")["distilled"]
    assert record["reward_kl"]["end"] <= record["reward_kl"]["start"]


def test_what_would_be_gone_with_the_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray_jobs.job import run_command

    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for out, work, named in (("out", "/tmp/work", "--out out"), ("/tmp/out", "work", "--work work")):
        assert run_command(["distil", "nowhere", "--out", out, "--work", work]) == 2
        assert f"lop: {named} is relative, and a Ray job's working directory is gone" in capsys.readouterr().err
