"""A pruned `tiny` and a few of its samples: a distillation in seconds."""

from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lop
from lop.model.samples import Sample, SampleSets
from lop.run.config import Config, find_config, load_config

# Steps of some 300 tokens; the start is looked at, and each second step.
QUICK = (
    "distil.tokens=2400", "distil.batch_tokens=300", "distil.every=2", "distil.learning_rate=0.002", "distil.top_k=8",
    "distil.prompt=1.0",
)  # fmt: skip


def write(path: Path, samples: tuple[Sample, ...]) -> None:
    rows = [{**asdict(sample), "options": list(sample.options)} for sample in samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory, samples: SampleSets) -> Path:
    """A folder with a few samples of each set."""
    folder = tmp_path_factory.mktemp("few")
    for name, step in (("calibration", 8), ("reward", 60), ("test", 900)):
        write(folder / f"{name}.parquet", getattr(samples, name)[::step])
    return folder


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` without 92% of its neurons, and nothing to make up for them."""
    folder = tmp_path_factory.mktemp("pruned") / "hf"
    lop.prune("tiny", folder, ratio=0.92, recovery="none")
    return folder


@pytest.fixture(scope="session")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, padded."""
    folder = tmp_path_factory.mktemp("pruned") / "padded"
    lop.prune("tiny", folder, ratio=0.92, recovery="none", format="padded")
    return folder


def settings(few: Path, *more: str) -> Config:
    """Of a quick distillation."""
    return load_config(find_config("tiny"), [f"samples={few}", *QUICK, *more])
