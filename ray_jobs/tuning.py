"""Predictors trained by Ray Tune: one trial for each architecture and learning rate."""

import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from ray import tune
from tqdm import tqdm

from lop.predictor.training import Fit, Pair, fit
from lop.run.settings import TrainSettings
from lop.storage.location import Location
from ray_jobs.cluster import connected
from ray_jobs.needs import ONE_CPU, Wait

_FILE = "fit.pt"
# Tune's own loggers (CSV, JSON, TensorBoard) would write the same numbers three more times; and its new output prints
# a table to stdout, whatever the verbosity. At Ctrl-C Tune would save its state and go on with half of the fits.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")


def tune_fits(
    training: Sequence[Pair],
    validation: Sequence[Pair],
    settings: TrainSettings,
    *,
    seed: int,
    storage: str,
    progress: bool = True,
) -> list[Fit]:
    """One fit for each architecture and learning rate, as `lop.predictor.training.fit` makes of the same arguments.

    Args:
        storage: an absolute path or URI for Tune's own records, one that all machines of the cluster share. They are
            in a folder of their own, which goes when the fits have been read: two trainings at once do not meet.

    Raises:
        LopError: the cluster cannot be reached, or has no CPU for a trial and never will.
    """
    trainable = tune.with_parameters(
        _trial, training=list(training), validation=list(validation), settings=settings, seed=seed
    )
    bar = _Progress(len(settings.architectures) * len(settings.learning_rates))
    with _scratch(Location.parse(storage)) as records, connected(), closing(bar):
        ONE_CPU.check()
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": ONE_CPU.cpus}),
            param_space={
                "architecture": tune.grid_search(list(settings.architectures)),
                "learning_rate": tune.grid_search(list(settings.learning_rates)),
            },
            tune_config=tune.TuneConfig(metric="validation_error", mode="min", reuse_actors=True),
            run_config=tune.RunConfig(
                name="predictors",
                storage_path=records.uri,
                verbose=0,
                callbacks=[_Reminder(), *([bar] if progress else [])],
                failure_config=tune.FailureConfig(max_failures=2),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            ),
        )
        results = tuner.fit()
        fits = [_read(result) for result in results]
    return sorted(fits, key=lambda found: (settings.architectures.index(found.architecture), found.learning_rate))  # type: ignore[arg-type]


@contextmanager
def _scratch(storage: Location) -> Iterator[Location]:
    """A new folder in the storage, which is removed when the block ends."""
    folder = storage / secrets.token_hex(4)
    try:
        yield folder
    finally:
        folder.remove()


class _Reminder(tune.Callback):  # type: ignore[misc]
    """Says what is waited for while no trial runs."""

    def setup(self, **info: Any) -> None:
        self._wait = Wait(ONE_CPU)

    def on_step_end(self, iteration: int, trials: Sequence[Any], **info: Any) -> None:
        if any(trial.status == "RUNNING" for trial in trials):
            self._wait.heard()
        else:
            self._wait.remind()


class _Progress(tune.Callback):  # type: ignore[misc]
    """A bar over trials that names the last one and its error."""

    def __init__(self, trials: int) -> None:
        self.trials = trials
        self.bar: tqdm[Any] | None = None

    def setup(self, **info: Any) -> None:
        # Not in __init__: Tune pickles its callbacks before it sets them up.
        self.bar = tqdm(total=self.trials, desc="train: fit", unit="trial")

    def close(self) -> None:
        """Ends the bar; Tune, interrupted, would not."""
        if self.bar is not None:
            self.bar.close()

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        assert self.bar is not None
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
