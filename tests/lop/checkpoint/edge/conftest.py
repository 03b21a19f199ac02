"""Models that are written as GGUF: the embedded one, pruned, and one with a tower as the published ones have."""

from pathlib import Path

import numpy as np
import pytest

from lop.checkpoint.export import export
from lop.model.find import assets
from lop.model.tensors import model_size
from lop.space.allocation import Allocation, Space, project
from lop.storage.headers import read_tensors
from tests.tower import make_model

MODEL = assets() / "model"
SIZE = model_size(read_tensors(MODEL))
SPACE = Space(SIZE.layers, SIZE.neurons, 8, 0.95)
ORDER = np.argsort(np.random.default_rng(3).random((SPACE.layers, SPACE.neurons)), axis=1)


@pytest.fixture(scope="session")
def allocation() -> Allocation:
    """No layer as wide as the dense model's, and none but a few in blocks of 32."""
    return project(np.linspace(0.15, 0.8, SPACE.layers), SPACE, SPACE.budget(0.45))


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory, allocation: Allocation) -> Path:
    """The embedded model in transformers' format."""
    out = tmp_path_factory.mktemp("edge") / "hf"
    export(MODEL, out, allocation, ORDER, about={"source": "tiny", "version": "1"}, format="hf")
    return out


@pytest.fixture(scope="session")
def towered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model whose vision tower llama.cpp computes."""
    return make_model(tmp_path_factory.mktemp("edge") / "towered")
