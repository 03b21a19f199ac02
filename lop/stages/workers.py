"""Independent pieces of work, done in this process or side by side on Ray actors, with the same results."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from lop.run.config import Config
from lop.run.run import Run

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_workers(
    build: Callable[[], Callable[[Item], Result]], items: Sequence[Item], config: Config
) -> Iterator[tuple[Item, Result]]:
    """Pairs of item and result, as they come.

    Args:
        build: makes a worker: a function of an item that holds what all items need. Picklable.
        config: `workers: 0` does it all here, and a single item that needs no GPU, too; more are actors, each with
            `threads` CPUs or `gpus_per_worker` GPUs.

    Raises:
        LopError: what a worker raised.
    """
    if not items:
        return
    if config.workers and (len(items) > 1 or config.gpus_per_worker):
        from ray_jobs.pool import map_on_actors

        yield from map_on_actors(build, items, config)
        return
    work = build()
    for item in items:
        yield item, work(item)


def on_worker(work: Callable[[Run], Result], run: Run) -> Result:
    """What `work` makes of a run with its model: in this process, or on an actor with the config's `gpus_per_worker`.

    There this process holds no GPU that the actors of what comes next need. The actor gets a copy of the files at the
    top of the run's folder, and of the predictor; what `work` writes is lost.

    Args:
        work: picklable, as is its result.

    Raises:
        LopError: what `work` raised, or there is no such actor and never will be.
    """
    if not run.config.workers or not run.config.gpus_per_worker:
        return work(run)
    files = {file.relative_to(run.folder): file.read_bytes() for file in _small_files(run.folder)}
    ((_, result),) = map_on_workers(partial(_RunCopy, run.config, files), [work], run.config)
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
