"""Set-up that must come before Ray is imported, and what many tests share."""

import os
import tempfile

# Ray writes an authentication token below HOME and reads it back; tests leave the user's alone.
os.environ["HOME"] = tempfile.mkdtemp(prefix="lop-home-")
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from lop.model.adapter import QwenVL, load_model
from lop.model.encoding import Encoded, encode
from lop.model.find import assets
from lop.model.samples import SampleSets, load_sample_sets
from lop.model.statistics import NeuronStatistics, calibrate
from tests.commands import FEW, lop_command

torch.set_num_threads(1)
# How long an example takes says more about what else runs on the machine.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts whole commands and clusters comes first: where processes share files, short ones are left last."""
    items.sort(key=lambda item: item.path.is_relative_to(Path(__file__).parent / "lop"))


@pytest.fixture(scope="session")
def samples() -> SampleSets:
    return load_sample_sets(assets() / "samples")


@pytest.fixture
def tiny() -> QwenVL:
    """The embedded model, fresh: elastic models change it in place."""
    return load_model(assets() / "model")


@pytest.fixture(scope="session")
def shared_tiny() -> QwenVL:
    """The embedded model for tests that do not change it."""
    return load_model(assets() / "model")


@pytest.fixture(scope="session")
def encoded(shared_tiny: QwenVL, samples: SampleSets) -> Encoded:
    return encode(shared_tiny, samples.reward[::15], batch_tokens=700)


@pytest.fixture(scope="session")
def tiny_statistics(shared_tiny: QwenVL, samples: SampleSets) -> NeuronStatistics:
    return calibrate(shared_tiny, encode(shared_tiny, samples.calibration[::10], batch_tokens=700))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every stage done, by the demo command."""
    folder = tmp_path_factory.mktemp("run") / "demo"
    done = lop_command("demo", "--run", folder, "--workers", "0", *FEW)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    # Without an address Ray joins whatever cluster was last started on this machine.
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of one megabyte."""
    import subprocess

    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)
