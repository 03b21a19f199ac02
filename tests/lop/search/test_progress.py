"""How far a search is, as its sinks are told and as `lop watch` shows it."""

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lop.errors import LopError
from lop.search import progress as module
from lop.search.ledger import Ledger
from lop.search.loop import InProcess, run_search
from lop.search.progress import Progress, SearchProgress, TargetProgress, log_sink, status_sink
from lop.search.watch import read_status, render, sparkline, watch
from lop.storage.location import Location
from tests.lop.search.test_loop import make_trees
from tests.lop.search.test_tree import SPACE, score


class Scored:
    """Evaluates at once, by a rule."""

    def evaluate(self, candidate):  # type: ignore[no-untyped-def]
        return score(candidate.allocation)


def shown(progress: Progress, *, now: float) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(progress, "runs/mine", now=now))
    return console.export_text()


def test_a_search_is_counted_from_its_first_to_its_last_evaluation(tmp_path: Path) -> None:
    trees = make_trees()
    told: list[Progress] = []
    watcher = SearchProgress(trees, SPACE, "log_probability", [(0.0, told.append)])
    workers = InProcess(Scored())
    watcher.prepared("scan", 3, 5)
    first = watcher.snapshot(workers)
    planned = sum(tree.limit for tree in trees.values())
    assert (first.done, first.planned, first.seconds_left) == (3, 5 + planned, None)
    assert all(target.best is None for target in first.targets)
    watcher.prepared("scan", 5, 5)
    with Ledger(tmp_path / "ledger", {}) as ledger:
        run_search(trees.values(), workers, ledger, watcher=watcher)
    watcher.finish(workers)
    last = told[-1]
    assert (last.done, last.seconds_left) == (last.planned, 0.0)
    assert [target.done for target in last.targets] == [len(tree.results) for tree in trees.values()]
    for target, tree in zip(last.targets, trees.values(), strict=True):
        allocation, evaluation = tree.best
        assert target.best == evaluation.log_probability
        assert np.allclose(target.ratios, allocation.ratios(SPACE))
    counts = [progress.done for progress in told]
    assert counts == sorted(counts)


def test_the_rate_is_of_this_process_and_of_the_last_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    watcher = SearchProgress(make_trees(), SPACE, "accuracy", [])
    workers = InProcess(Scored())
    watcher.prepared("scan", 100, 1000)  # What an earlier process did.
    watcher.tick(workers)
    for second in range(1, 301):
        clock[0] += 1
        watcher.prepared("scan", 100 + (second if second <= 150 else 150 + 3 * (second - 150)), 1000)
        found = watcher.snapshot(workers)
        if second == 100:
            assert found.per_second == pytest.approx(1)
    assert found.per_second == pytest.approx(3)
    assert found.seconds_left == pytest.approx((found.planned - found.done) / 3)


def test_sinks_are_told_as_often_as_they_want(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    often, seldom = [], []
    watcher = SearchProgress(make_trees(), SPACE, "accuracy", [(1.0, often.append), (10.0, seldom.append)])
    workers = InProcess(Scored())
    for _ in range(400):
        clock[0] += 0.1
        watcher.tick(workers)
    assert 35 <= len(often) <= 40
    assert 3 <= len(seldom) <= 4


def progress(*, done: int, time: float = 0.0, best: float | None = -0.25) -> Progress:
    target = TargetProgress(0.3, done, 40, best, () if best is None else (0.0, 0.5, 1.0))
    return Progress(time, done, 40, 2.0, 20.0, 3, "log_probability", (target,))


def test_status_is_written_and_read_again(tmp_path: Path) -> None:
    location = Location.parse(tmp_path)
    with pytest.raises(LopError, match="no search has begun"):
        read_status(location)
    status_sink(location)(progress(done=10))
    assert read_status(location) == progress(done=10)
    (tmp_path / "status.json").write_text(json.dumps(asdict(progress(done=10)))[:-20])
    with pytest.raises(LopError, match="damaged"):
        read_status(location)


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    status_sink(Location.parse(tmp_path / "file"))(progress(done=1))
    assert "cannot be written" in caplog.text


def test_a_log_line_says_all_there_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_sink(progress(done=10))
        log_sink(progress(done=0, best=None))
    assert "search: 10 of 40 evaluations, 2 per second" in caplog.text
    assert "3 workers; best log probability by target: 30%: -0.25" in caplog.text
    assert "by target: none yet" in caplog.text


def test_watching_tells_a_search_that_runs_from_one_that_is_silent_or_over(tmp_path: Path) -> None:
    now = time.time()
    assert "10 of 40 evaluations, 2 per second" in shown(progress(done=10, time=now), now=now)
    assert "3 workers" in shown(progress(done=10, time=now), now=now)
    assert "not heard of for" in shown(progress(done=10, time=now - 3600), now=now)
    over = shown(progress(done=40), now=now)
    assert "40 of 40 evaluations, finished" in over
    assert "30%" in over
    assert "-0.2500" in over
    assert sparkline([1.0, 0.5, 0.0]) in over


def test_watching_once_prints_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status_sink(Location.parse(tmp_path))(progress(done=40))
    watch(Location.parse(tmp_path), once=True)
    assert "finished" in capsys.readouterr().out
