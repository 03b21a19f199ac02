"""A `Compute` that does everything in this process, one thing after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from lop.run.building import Materials, build_scorer
from lop.run.compute import Item, Result
from lop.run.config import Config
from lop.run.run import Run
from lop.search.loop import InProcess, Workers
from lop.search.progress import Sink
from lop.storage.location import Location


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

    def tune(
        self,
        trial: Callable[[Item], tuple[float, Result]],
        items: Mapping[str, Item],
        storage: Location,
        *,
        progress: bool,
    ) -> list[Result]:
        """Each trial after the one before it; nothing is stored."""
        return [trial(item)[1] for item in items.values()]

    def sinks(self) -> list[Sink]:
        """None."""
        return []
