"""Ray Tune's part of training: the same weights as in one process, and a quiet terminal."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lop.predictor.training import Pair, split_pairs
from lop.run.settings import TrainSettings
from lop.stages.local import Local
from lop.stages.train import Trial
from lop.storage.location import Location
from ray_jobs.tuning import tune_each

pytestmark = pytest.mark.usefixtures("ray_cluster")
TRAINING, VALIDATION = split_pairs(
    [Pair(n / 10, tuple(n / 10 + 0.01 * layer for layer in range(5))) for n in range(1, 8)], 0.2
)
SETTINGS = TrainSettings(epochs=3, batch=4)
TRIAL = Trial(TRAINING, VALIDATION, SETTINGS, seed=4)
ITEMS = {
    f"{name} {rate}": (name, rate) for name in ("mlp", "transformer", "lstm") for rate in (3e-3, 1e-3)
}  # In an order that nothing else has.


def test_tune_makes_the_fits_of_one_process_bit_for_bit_and_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tune_each(TRIAL, ITEMS, Location.parse(tmp_path))
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = [line for line in shown.err.replace("\r", "\n").splitlines() if line.strip()]
    assert all(line.startswith("train: fit") for line in lines)
    assert "6/6" in lines[-1]
    assert [(found.architecture, found.learning_rate) for found in tuned] == list(ITEMS.values())
    torch.set_num_threads(2)
    try:
        for found, alone in zip(tuned, Local().tune(TRIAL, ITEMS, Location.parse(tmp_path), progress=False)):
            assert found.training_errors == alone.training_errors
            assert found.validation_errors == alone.validation_errors
            assert found.weights.keys() == alone.weights.keys()
            for name, array in found.weights.items():
                np.testing.assert_array_equal(array, alone.weights[name])
    finally:
        torch.set_num_threads(1)


def test_trainings_in_the_same_folder_do_not_meet_and_leave_nothing(tmp_path: Path) -> None:
    for seed in (1, 2):
        trial = Trial(TRAINING, VALIDATION, SETTINGS, seed)
        (found,) = tune_each(trial, {"one": ("mlp", 1e-3)}, Location.parse(tmp_path), progress=False)
        assert found.validation_errors == trial(("mlp", 1e-3))[1].validation_errors
    assert list(tmp_path.iterdir()) == []
