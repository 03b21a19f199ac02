"""A `Compute` that does everything in this process, one thing after the other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from lop.predictor.training import Fit, Pair, fit
from lop.run.building import Materials, build_scorer
from lop.run.compute import Item, Result
from lop.run.config import Config
from lop.run.run import Run
from lop.search.loop import InProcess, Workers
from lop.search.progress import Sink


class Local:
    """Computes here; see `lop.run.compute.Compute`."""

    @contextmanager
    def evaluators(self, run: Run) -> Iterator[Workers]:
        """One evaluator."""
        yield InProcess(build_scorer(Materials.of(run), *run.searched_samples))

    def map(
        self, build: Callable[[], Callable[[Item], Result]], items: Sequence[Item], config: Config
    ) -> Iterator[tuple[Item, Result]]:
        """Each item after the one before it; nothing is built for none."""
        if not items:
            return
        work = build()
        for item in items:
            yield item, work(item)

    def fits(self, run: Run, training: Sequence[Pair], validation: Sequence[Pair], *, progress: bool) -> list[Fit]:
        """Each fit after the one before it."""
        settings = run.config.train
        torch.set_num_threads(run.config.threads)
        return [
            fit(
                architecture,
                training,
                validation,
                epochs=settings.epochs,
                batch=settings.batch,
                learning_rate=rate,
                seed=run.config.seed,
            )
            for architecture in settings.architectures
            for rate in settings.learning_rates
        ]

    def sinks(self) -> list[Sink]:
        """None."""
        return []
