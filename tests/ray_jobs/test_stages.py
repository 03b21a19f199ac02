"""Search and training on Ray actors give what one process gives, bit for bit."""

import json
from pathlib import Path

import pytest
import torch

from lop.config import Config, TrainSettings, find_config, load_config
from lop.run import Run
from lop.stages import calibrate_stage, search_stage
from lop.training import Pair, fit, split_pairs
from ray_jobs.train import tune_fits

pytestmark = pytest.mark.usefixtures("ray_cluster")
SETTINGS = ["search.targets={first: 0.3, last: 0.5, step: 0.1}", "search.evaluations=4", "search.simulations=6"]


def searched(folder: Path, workers: int) -> tuple[dict[str, object], list[str]]:
    config: Config = load_config(find_config("tiny"), SETTINGS, workers=workers)
    run = Run(config, folder)
    calibrate_stage(run, progress=False)
    search_stage(run, progress=False)
    return json.loads(run.search_file.read_text()), sorted(run.ledger_file.read_text().splitlines())


def test_a_search_on_actors_is_the_search_of_one_process(tmp_path: Path) -> None:
    assert searched(tmp_path / "fleet", workers=2) == searched(tmp_path / "alone", workers=0)


def test_tune_trains_what_one_process_trains(tmp_path: Path) -> None:
    pairs = [Pair(n / 20, tuple(n / 20 + 0.01 * layer for layer in range(5))) for n in range(1, 13)]
    training, validation = split_pairs(pairs, 0.2)
    settings = TrainSettings(epochs=3, learning_rates=(1e-3, 3e-3))
    tuned = tune_fits(training, validation, settings, seed=4, storage=tmp_path)
    assert [(found.architecture, found.learning_rate) for found in tuned] == [
        (name, rate) for name in settings.architectures for rate in settings.learning_rates
    ]
    torch.set_num_threads(1)
    for found in tuned:
        alone = fit(
            found.architecture,
            training,
            validation,
            epochs=3,
            batch=settings.batch,
            learning_rate=found.learning_rate,
            seed=4,
        )
        assert found.validation_errors == alone.validation_errors
        for name, tensor in found.weights.items():
            torch.testing.assert_close(tensor, alone.weights[name], atol=0, rtol=0)
