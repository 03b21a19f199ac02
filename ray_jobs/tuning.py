"""Trainings to choose among, as trials of Ray Tune."""

import os
import pickle
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ray import tune
from tqdm import tqdm

from lop.storage.location import Location
from ray_jobs.cluster import connected
from ray_jobs.needs import ONE_CPU, Wait

Item = TypeVar("Item")
Result = TypeVar("Result")
_FILE = "result.pickle"
# Tune's own loggers (CSV, JSON, TensorBoard) would write the same numbers three more times; and its new output prints
# a table to stdout, whatever the verbosity. At Ctrl-C Tune would save its state and go on with half of the trials.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")


def tune_each(
    trial: Callable[[Item], tuple[float, Result]],
    items: Mapping[str, Item],
    storage: Location,
    *,
    progress: bool = True,
) -> list[Result]:
    """What trials make of items, in their order; see `lop.run.compute.Compute.tune`.

    Args:
        storage: for Tune's own records. They are in a folder of their own, which goes when the results have been read:
            two trainings at once do not meet.

    Raises:
        LopError: the cluster cannot be reached, or has no CPU for a trial and never will.
    """
    trainable = tune.with_parameters(_run, trial=trial, items=dict(items))
    bar = _Progress(len(items))
    with _scratch(storage) as records, connected(), closing(bar):
        ONE_CPU.check()
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": ONE_CPU.cpus}),
            param_space={"name": tune.grid_search(list(items))},
            tune_config=tune.TuneConfig(metric="error", mode="min", reuse_actors=True),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=records.uri,
                verbose=0,
                callbacks=[_Reminder(), *([bar] if progress else [])],
                failure_config=tune.FailureConfig(max_failures=2),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            ),
        )
        found = dict(map(_read, tuner.fit()))
    return [found[name] for name in items]


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
        self.bar.set_postfix_str(f"{trial.config['name']}: {trial.last_result['error']:.2e}")
        self.bar.update()


def _run(config: dict[str, Any], *, trial: Callable[[Item], tuple[float, Result]], items: Mapping[str, Item]) -> None:
    error, found = trial(items[config["name"]])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _FILE).write_bytes(pickle.dumps(found))
        tune.report({"error": error}, checkpoint=tune.Checkpoint.from_directory(folder))


def _read(result: Any) -> tuple[str, Any]:
    if result.error:
        raise result.error
    with result.checkpoint.as_directory() as folder:
        return result.config["name"], pickle.loads((Path(folder) / _FILE).read_bytes())
