"""The training stage on a cluster: Ray Tune trains one trial for each architecture and learning rate."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ray import tune
from tqdm import tqdm

from lop.config import TrainSettings
from lop.storage import Location
from lop.training import Fit, Pair, fit
from ray_jobs.cluster import connected
from ray_jobs.job import run_on_driver

_FILE = "fit.pt"
# Tune's own loggers (CSV, JSON, TensorBoard) would write the same numbers three more times; and its new output prints
# a table to stdout, whatever the verbosity.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")


def tune_fits(
    training: Sequence[Pair],
    validation: Sequence[Pair],
    settings: TrainSettings,
    *,
    seed: int,
    storage: str,
    progress: bool = True,
) -> list[Fit]:
    """One fit for each architecture and learning rate, the same as `lop.training.fit` makes of the same arguments.

    Args:
        storage: an absolute path or URI for Tune's own records, one that all machines of the cluster share. What an
            earlier training has left there is removed: Tune would keep adding to it.

    Raises:
        LopError: the cluster cannot be reached.
    """
    trainable = tune.with_parameters(
        _trial, training=list(training), validation=list(validation), settings=settings, seed=seed
    )
    Location.parse(storage).clear()
    trials = len(settings.architectures) * len(settings.learning_rates)
    with connected():
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space={
                "architecture": tune.grid_search(list(settings.architectures)),
                "learning_rate": tune.grid_search(list(settings.learning_rates)),
            },
            tune_config=tune.TuneConfig(metric="validation_error", mode="min", reuse_actors=True),
            run_config=tune.RunConfig(
                name="predictors",
                storage_path=storage,
                verbose=0,
                callbacks=[_Progress(trials)] if progress else None,
                failure_config=tune.FailureConfig(max_failures=2),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            ),
        )
        results = tuner.fit()
        fits = [_read(result) for result in results]
    return sorted(fits, key=lambda found: (settings.architectures.index(found.architecture), found.learning_rate))  # type: ignore[arg-type]


class _Progress(tune.Callback):  # type: ignore[misc]
    """A bar over trials that names the last one and its error."""

    def __init__(self, trials: int) -> None:
        self.trials = trials

    def setup(self, **info: Any) -> None:
        # Not in __init__: Tune pickles its callbacks before it sets them up.
        self.bar = tqdm(total=self.trials, desc="train: fit", unit="trial")

    def on_experiment_end(self, trials: Sequence[Any], **info: Any) -> None:
        self.bar.close()

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        self.bar.set_postfix_str(f"{trial.config['architecture']}: {trial.last_result['validation_error']:.2e}")
        self.bar.update()


def _trial(
    config: dict[str, Any], *, training: list[Pair], validation: list[Pair], settings: TrainSettings, seed: int
) -> None:
    found = fit(
        config["architecture"],
        training,
        validation,
        epochs=settings.epochs,
        batch=settings.batch,
        learning_rate=config["learning_rate"],
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.save(vars(found), Path(folder) / _FILE)
        checkpoint = tune.Checkpoint.from_directory(folder)
        tune.report({"validation_error": found.validation_error}, checkpoint=checkpoint)


def _read(result: Any) -> Fit:
    if result.error:
        raise result.error
    with result.checkpoint.as_directory() as folder:
        return Fit(**torch.load(Path(folder) / _FILE, weights_only=False))


if __name__ == "__main__":
    run_on_driver("train")
