"""Independent work on actors: the same results as in one process, whatever happens to the actors."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from lop.errors import LopError
from lop.run.config import Config, find_config, load_config
from lop.stages.local import Local
from ray_jobs.compute import OnRay

pytestmark = pytest.mark.usefixtures("ray_cluster")
ITEMS = list(range(7))


def config(workers: int) -> Config:
    return load_config(find_config("tiny"), [], workers=workers)


def square(folder: Path, fatal: int = -1, times: int = 0) -> Callable[[int], int]:
    """Squares a number and writes down by which process; the `fatal` one kills it, the first few `times`."""

    def work(item: int) -> int:
        with (folder / str(item)).open("a") as file:
            file.write(f"{os.getpid()}\n")
        if item == fatal and len((folder / str(item)).read_text().split()) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item

    return work


def refuses(when: str) -> Callable[[int], int]:
    if when == "building":
        raise LopError("model 'x' is missing: name another")

    def work(item: int) -> int:
        raise LopError(f"item {item} is no good") if when == "working" else ZeroDivisionError("a bug")

    return work


def test_results_are_those_of_one_process_though_an_actor_is_killed(tmp_path: Path) -> None:
    alone, actors = tmp_path / "alone", tmp_path / "actors"
    alone.mkdir()
    actors.mkdir()
    expected = list(Local().map(partial(square, alone), ITEMS, config(0)))
    found = list(OnRay().map(partial(square, actors, fatal=3, times=2), ITEMS, config(2)))
    assert sorted(found) == expected == [(item, item * item) for item in ITEMS]
    tries = {item: (actors / str(item)).read_text().split() for item in ITEMS}
    assert [len(tries[item]) for item in ITEMS] == [1, 1, 1, 3, 1, 1, 1]
    processes = {process for item in ITEMS for process in tries[item]}
    assert len(processes) >= 3
    assert str(os.getpid()) not in processes


def test_actors_that_the_cluster_has_no_room_for_keep_nothing_from_the_others(tmp_path: Path) -> None:
    found = list(OnRay().map(partial(square, tmp_path), ITEMS, config(7)))  # On four CPUs.
    assert sorted(found) == [(item, item * item) for item in ITEMS]


@pytest.mark.parametrize(
    ("when", "error", "message"),
    [
        ("building", LopError, r"^model 'x' is missing: name another$"),
        ("working", LopError, r"^item \d is no good$"),
        ("by mistake", ZeroDivisionError, "a bug"),
    ],
)
def test_what_a_worker_raises_arrives_as_that(when: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(OnRay().map(partial(refuses, when), ITEMS, config(2)))


def test_an_item_that_no_actor_survives_is_named(tmp_path: Path) -> None:
    with pytest.raises(LopError, match=r"^a worker died 4 times at 3: "):
        list(OnRay().map(partial(square, tmp_path, fatal=3, times=99), ITEMS, config(2)))
