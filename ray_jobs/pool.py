"""Independent pieces of work on actors: minutes each, so a simple pool does."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from lop.config import Config
from lop.errors import LopError, first_line
from ray_jobs.cluster import connected

Item = TypeVar("Item")
Result = TypeVar("Result")
_ATTEMPTS = 3


class _Worker:
    """Builds its function when it is first needed, so that a failure to build reaches the driver as the error it is."""

    def __init__(self) -> None:
        self._work: Callable[[Any], Any] | None = None

    def do(self, build: tuple[ray.ObjectRef], item: Any) -> Any:
        # In a tuple: a bare reference Ray would fetch for every item.
        if self._work is None:
            self._work = ray.get(build[0])()
        return self._work(item)


def map_on_actors(
    build: Callable[[], Callable[[Item], Result]], items: Sequence[Item], config: Config
) -> Iterator[tuple[Item, Result]]:
    """Pairs of item and result, as they come; an actor that dies is started again, and its item with it.

    Args:
        build: makes a worker's function; picklable.

    Raises:
        LopError: what a worker raised, or an item whose actors die again and again.
    """
    with connected():
        shared = (ray.put(build),)
        actor_class = ray.remote(
            num_cpus=config.threads,
            num_gpus=config.gpus_per_worker,
            max_restarts=_ATTEMPTS,
            max_task_retries=_ATTEMPTS,
        )(_Worker)
        idle = [actor_class.remote() for _ in range(min(config.workers, len(items)))]
        running: dict[Any, tuple[Any, Item]] = {}
        waiting = list(reversed(items))
        while waiting or running:
            while waiting and idle:
                actor, item = idle.pop(), waiting.pop()
                running[actor.do.remote(shared, item)] = (actor, item)
            (done,), _ = ray.wait(list(running))
            actor, item = running.pop(done)
            yield item, _result(done, item)
            idle.append(actor)


def _result(reference: ray.ObjectRef, item: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, LopError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise LopError(f"a worker died {1 + _ATTEMPTS} times at {item}: {first_line(error)}") from error
