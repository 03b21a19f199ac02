"""Independent pieces of work, done in this process or side by side on Ray actors, with the same results."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from lop.config import Config

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_workers(
    build: Callable[[], Callable[[Item], Result]], items: Sequence[Item], config: Config
) -> Iterator[tuple[Item, Result]]:
    """Pairs of item and result, as they come.

    Args:
        build: makes a worker: a function of an item that holds what all items need. Picklable.
        config: `workers: 0` does it all here; more are actors, each with `threads` CPUs and `gpus_per_worker` GPUs.

    Raises:
        LopError: what a worker raised.
    """
    if not items:
        return
    if config.workers and len(items) > 1:
        from ray_jobs.pool import map_on_actors

        yield from map_on_actors(build, items, config)
        return
    work = build()
    for item in items:
        yield item, work(item)
