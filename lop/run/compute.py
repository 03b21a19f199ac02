"""Where a stage computes: it is handed a `Compute`.

There is one in this process (`lop.stages.local`) and one on Ray (`ray_jobs.compute`), with the same results.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol, TypeVar

from lop.run.config import Config
from lop.run.run import Run
from lop.storage.location import Location

if TYPE_CHECKING:
    from lop.search.loop import Workers
    from lop.search.progress import Sink

Item = TypeVar("Item")
Result = TypeVar("Result")


class Compute(Protocol):
    """What a stage needs others to do for it."""

    def evaluators(self, run: Run) -> "AbstractContextManager[Workers]":
        """Whatever evaluates allocations on the run's reward samples, inside the block.

        Raises:
            LopError: the model cannot be loaded, or workers cannot be had.
        """

    def map(
        self, build: Callable[[], Callable[[Item], Result]], items: Sequence[Item], config: Config
    ) -> Iterator[tuple[Item, Result]]:
        """Pairs of item and result, as they come, of independent pieces of work.

        Args:
            build: makes a worker: a function of an item that holds what all items need. Picklable.
            config: what a worker needs.

        Raises:
            LopError: what a worker raised, or workers cannot be had.
        """

    def tune(
        self,
        trial: Callable[[Item], tuple[float, Result]],
        items: Mapping[str, Item],
        storage: Location,
        *,
        progress: bool,
    ) -> list[Result]:
        """What trials make of items, in their order: trainings on one CPU each, to choose among.

        Args:
            trial: an item's error and result; picklable, as are both.
            items: by what they are called.
            storage: where records are kept meanwhile that all machines of a cluster share.

        Raises:
            LopError: what a trial raised, or workers cannot be had.
        """

    def sinks(self) -> "list[Sink]":
        """Where else a search's progress is shown, while the evaluators are there."""


def on_worker(work: Callable[[Run], Result], run: Run, compute: Compute) -> Result:
    """What `work` makes of a run with its model: in this process, or on a worker with the config's `gpus_per_worker`.

    There this process holds no GPU that the workers of what comes next need. The worker gets a copy of the files at the
    top of the run's folder, and of the predictor; what `work` writes is lost.

    Args:
        work: picklable, as is its result.

    Raises:
        LopError: what `work` raised, or there is no such worker and never will be.
    """
    if not run.config.workers or not run.config.gpus_per_worker:
        return work(run)
    files = {file.relative_to(run.folder): file.read_bytes() for file in _small_files(run.folder)}
    ((_, result),) = compute.map(partial(_RunCopy, run.config, files), [work], run.config)
    return result


class _RunCopy:
    """A run in a temporary folder, to work on."""

    def __init__(self, config: Config, files: Mapping[Path, bytes]) -> None:
        self._folder = TemporaryDirectory(prefix="lop-run-")
        folder = Path(self._folder.name)
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        self._run = Run(config, folder)

    def __call__(self, work: Callable[[Run], Result]) -> Result:
        return work(self._run)


def _small_files(folder: Path) -> Iterator[Path]:
    for pattern in ("*", "predictor/*"):
        yield from (path for path in folder.glob(pattern) if path.is_file())
