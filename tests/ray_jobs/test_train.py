"""Ray Tune's part of training: the same weights as in one process, and a quiet terminal."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lop.predictor.training import Pair, fit, split_pairs
from lop.run.settings import TrainSettings
from ray_jobs.tuning import tune_fits

pytestmark = pytest.mark.usefixtures("ray_cluster")
TRAINING, VALIDATION = split_pairs(
    [Pair(n / 10, tuple(n / 10 + 0.01 * layer for layer in range(5))) for n in range(1, 8)], 0.2
)
SETTINGS = TrainSettings(epochs=3, batch=4, learning_rates=(3e-3, 1e-3))


def test_tune_makes_the_fits_of_one_process_bit_for_bit_and_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tune_fits(TRAINING, VALIDATION, SETTINGS, seed=4, storage=str(tmp_path))
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = [line for line in shown.err.replace("\r", "\n").splitlines() if line.strip()]
    assert all(line.startswith("train: fit") for line in lines)
    assert "6/6" in lines[-1]
    assert [found.architecture for found in tuned] == ["mlp", "mlp", "lstm", "lstm", "transformer", "transformer"]
    assert [found.learning_rate for found in tuned] == [1e-3, 3e-3] * 3
    torch.set_num_threads(2)
    try:
        for found in tuned:
            alone = fit(
                found.architecture,
                TRAINING,
                VALIDATION,
                epochs=3,
                batch=4,
                learning_rate=found.learning_rate,
                seed=4,
            )
            assert found.training_errors == alone.training_errors
            assert found.validation_errors == alone.validation_errors
            assert found.weights.keys() == alone.weights.keys()
            for name, array in found.weights.items():
                np.testing.assert_array_equal(array, alone.weights[name])
    finally:
        torch.set_num_threads(1)


def test_trainings_in_the_same_folder_do_not_meet_and_leave_nothing(tmp_path: Path) -> None:
    settings = TrainSettings(architectures=("mlp",), epochs=2)
    for seed in (1, 2):
        (found,) = tune_fits(TRAINING, VALIDATION, settings, seed=seed, storage=str(tmp_path), progress=False)
        alone = fit("mlp", TRAINING, VALIDATION, epochs=2, batch=40, learning_rate=1e-3, seed=seed)
        assert found.validation_errors == alone.validation_errors
    assert list(tmp_path.iterdir()) == []
