"""A `Compute` on a Ray cluster: the one it was submitted to, or one on this machine."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from lop.run.building import Materials
from lop.run.compute import Item, Result
from lop.run.config import Config
from lop.run.run import Run
from lop.search.loop import Workers
from lop.search.progress import Sink
from lop.stages.local import Local
from lop.storage.location import Location
from ray_jobs.evaluators import evaluator_fleet
from ray_jobs.metrics import metrics_sink
from ray_jobs.pool import map_on_actors
from ray_jobs.tuning import tune_each


class OnRay:
    """Computes on actors; see `lop.run.compute.Compute`."""

    def evaluators(self, run: Run) -> AbstractContextManager[Workers]:
        """A fleet of at most the config's `workers` actors."""
        return evaluator_fleet(Materials.of(run), *run.searched_samples)

    def map(
        self, build: Callable[[], Callable[[Item], Result]], items: Sequence[Item], config: Config
    ) -> Iterator[tuple[Item, Result]]:
        """Side by side on actors with `threads` CPUs or `gpus_per_worker` GPUs; a single item without a GPU here."""
        if len(items) > 1 or (items and config.gpus_per_worker):
            return map_on_actors(build, items, config)
        return Local().map(build, items, config)

    def tune(
        self,
        trial: Callable[[Item], tuple[float, Result]],
        items: Mapping[str, Item],
        storage: Location,
        *,
        progress: bool,
    ) -> list[Result]:
        """Trials of Ray Tune."""
        return tune_each(trial, items, storage, progress=progress)

    def sinks(self) -> list[Sink]:
        """The cluster's metrics."""
        return [metrics_sink()]
