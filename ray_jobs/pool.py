"""Independent pieces of work on actors: minutes each, so a simple pool does."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from lop.errors import LopError, first_line
from lop.run.config import Config
from ray_jobs.cluster import connected
from ray_jobs.needs import Needs, Wait

Item = TypeVar("Item")
Result = TypeVar("Result")
_ATTEMPTS = 3
_SECONDS_A_ROUND = 1.0


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

    Items go to actors that are there: one that the cluster has no room for keeps none from the others. An actor that
    nothing is left for gives back what it holds.

    Args:
        build: makes a worker's function; picklable.

    Raises:
        LopError: what a worker raised, an item whose actors die again and again, or actors that can never be had.
    """
    needs = Needs.of(config)
    with connected():
        needs.check()
        shared = (ray.put(build),)
        actor_class = ray.remote(
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            max_restarts=_ATTEMPTS,
            max_task_retries=_ATTEMPTS,
        )(_Worker)
        actors = [actor_class.remote() for _ in range(min(config.workers, len(items)))]
        starting = {actor.__ray_ready__.remote(): actor for actor in actors}
        del actors  # An actor lives as long as somebody holds it.
        running: dict[Any, tuple[Any, Item]] = {}
        waiting = list(reversed(items))
        wait = Wait(needs)
        while waiting or running:
            ready, _ = ray.wait([*starting, *running], timeout=_SECONDS_A_ROUND)
            for reference in ready:
                wait.heard()
                if reference in starting:
                    actor = starting.pop(reference)
                else:
                    actor, item = running.pop(reference)
                    yield item, _result(reference, item)
                if waiting:
                    item = waiting.pop()
                    running[actor.do.remote(shared, item)] = (actor, item)
            if not waiting:
                starting.clear()
            if not running:
                wait.remind()


def _result(reference: ray.ObjectRef, item: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, LopError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise LopError(f"a worker died {1 + _ATTEMPTS} times at {item}: {first_line(error)}") from error
