"""Ledgers that are flushed, killed, reopened and merged in any order keep every record, none more than once."""

import math
import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from lop.search.evaluation import Evaluation
from lop.search.ledger import Ledger, _line, read_ledger
from lop.search.racing import Candidate
from lop.space.allocation import Allocation
from lop.storage.location import Location
from tests.lop.search.test_ledger import ENTRIES, PRINTS


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(2, 4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=6, deadline=None)
def test_merging_and_opening_again_keep_every_record_in_order(tmp_path: Path, sizes: list[int], merge: int) -> None:
    folder = tmp_path / "ledger"
    shutil.rmtree(folder, ignore_errors=True)
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lop.search.ledger._MERGE", merge)
        for start in range(0, len(sizes) + 1, 7):
            with Ledger(folder, PRINTS, seconds=0) as ledger:
                for size in sizes[start : start + 7]:
                    for _ in range(size):
                        written.append((Allocation((len(written), 1)), ENTRIES[0][1]))
                        ledger.append(*written[-1])
                    ledger.flush()
                    assert list(read_ledger(folder)) == written
                assert all(ledger.get(Candidate(allocation)) == result for allocation, result in written)
        # The files grow in number with the logarithm of the flushes, and those since it was opened.
        assert len(list(folder.iterdir())) <= 7 + merge * (1 + math.ceil(math.log(len(sizes) + 2, merge)))


class Killed(BaseException):
    """The process is no more: from here on none of its operations on files does anything."""


@dataclass(frozen=True)
class Mortal(Location):
    """A folder whose process may be killed before or after any operation that changes a file."""

    left: list[int] = field(default_factory=list, compare=False)

    def write(self, name: str, data: bytes) -> None:
        self._live()
        super().write(name, data)
        self._live()

    def delete(self, name: str) -> None:
        self._live()
        super().delete(name)
        self._live()

    def _live(self) -> None:
        if self.left:
            if not self.left[0]:
                raise Killed
            self.left[0] -= 1


class LedgerMachine(RuleBasedStateMachine):
    """Any number of flushes, reopenings, kills and merges, against a list of what was flushed."""

    @initialize(merge=st.integers(2, 5), is_remote=st.booleans())
    def begin(self, merge: int, is_remote: bool) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("lop.search.ledger._MERGE", merge)
        self.parent = TemporaryDirectory()
        self.folder = Path(self.parent.name) / "ledger"
        local = LocalFileSystem()
        # Remote storage has no locks, and its files are moved into place.
        self.filesystem = SubTreeFileSystem(self.parent.name, local) if is_remote else local
        self.path = "ledger" if is_remote else str(self.folder)
        self.flushed: list[tuple[Allocation, Evaluation]] = []
        self.ledger: Ledger | None = None

    def location(self) -> Mortal:
        return Mortal(self.filesystem, self.path, "the ledger")

    def next(self, records: int) -> list[tuple[Allocation, Evaluation]]:
        start = len(self.flushed)
        return [(Allocation((number, 1)), Evaluation(number / 7, -1.0)) for number in range(start, start + records)]

    @precondition(lambda self: self.ledger is None)
    @rule(left=st.none() | st.integers(0, 12))
    def open(self, left: int | None) -> None:
        location = self.location()
        location.left.extend([] if left is None else [left])
        with suppress(Killed):
            self.ledger = Ledger(location, PRINTS)
            location.left.clear()
            assert len(self.ledger) == len(self.flushed)

    @precondition(lambda self: self.ledger is not None)
    @rule(flushes=st.lists(st.integers(1, 2), min_size=1, max_size=12))
    def flush(self, flushes: list[int]) -> None:
        assert self.ledger is not None
        for records in flushes:
            new = self.next(records)
            for entry in new:
                self.ledger.append(*entry)
            self.ledger.flush()
            self.flushed += new

    @precondition(lambda self: self.ledger is not None)
    @rule(left=st.integers(0, 12))
    def flush_and_be_killed(self, left: int) -> None:
        assert self.ledger is not None
        cast(Mortal, self.ledger.location).left.append(left)
        new: list[tuple[Allocation, Evaluation]] = []
        with suppress(Killed), self.ledger:
            while True:
                new = self.next(1)
                self.ledger.append(*new[0])
                self.ledger.flush()
                self.flushed += new
        self.ledger = None
        # The last record's file may have appeared, though nobody lived to be told.
        if len(list(read_ledger(self.location()))) > len(self.flushed):
            self.flushed += new

    @precondition(lambda self: self.ledger is not None)
    @rule()
    def close(self) -> None:
        assert self.ledger is not None
        with self.ledger:
            pass
        self.ledger = None

    @precondition(lambda self: self.folder.exists())
    @invariant()
    def what_was_flushed_is_read_once_and_in_order(self) -> None:
        if any(self.folder.glob("*.jsonl")):
            assert list(read_ledger(self.location())) == self.flushed

    @precondition(lambda self: self.ledger is not None)
    @invariant()
    def what_is_open_holds_no_record_twice(self) -> None:
        lines = [line for file in self.folder.glob("*.jsonl") for line in file.read_bytes().splitlines()[1:]]
        assert len(lines) == len(set(lines)) == len(self.flushed)

    def teardown(self) -> None:
        if hasattr(self, "parent"):
            if self.ledger is not None:
                with self.ledger:
                    pass
            self.patch.undo()
            self.parent.cleanup()


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)


@pytest.mark.parametrize("flushes", [63, 64, 65, 254])
def test_a_ledger_of_any_number_of_files_is_opened_again_without_loss(tmp_path: Path, flushes: int) -> None:
    location = Location.parse(tmp_path / "ledger")
    with Ledger(location, PRINTS) as ledger:
        header = ledger._header
    entries = [(Allocation((number, 1)), Evaluation(number / 7, -1.0)) for number in range(flushes)]
    for number, (allocation, evaluation) in enumerate(entries, start=1):
        record = _line({"widths": list(allocation.widths), **evaluation.as_dict()})
        (tmp_path / "ledger" / f"{number:09d}-{number:09d}-aaaaaaaa.jsonl").write_bytes(header + record)
    for _ in range(2):
        with Ledger(location, PRINTS) as ledger:
            assert len(ledger) == flushes
        assert list(read_ledger(location)) == entries


def test_a_listing_that_misses_a_merge_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lop.search.ledger._MERGE", 4)
    with Ledger(tmp_path / "ledger", PRINTS) as ledger:
        for entry in ENTRIES[:2]:
            ledger.append(*entry)
            ledger.flush()
        files, remaining = Location.files, [ENTRIES[2]]

        def slow_listing(location: Location) -> list[str]:
            # Names are read first, and then looked at one by one: those that have gone meanwhile are left out.
            names = files(location)
            while remaining:
                ledger.append(*remaining.pop())
                ledger.flush()
            return [name for name in names if (tmp_path / "ledger" / name).exists()]

        monkeypatch.setattr(Location, "files", slow_listing)
        assert slow_listing(ledger.location) == []
        remaining.append(ENTRIES[3])
        assert len(list(tmp_path.rglob("*.jsonl"))) == 1
        for number in range(10, 13):
            ledger.append(Allocation((number,)), ENTRIES[0][1])
            ledger.flush()
        assert len(list(read_ledger(tmp_path / "ledger"))) == 7


def test_two_searches_on_storage_without_locks_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lop.search.ledger._MERGE", 3)
    place = Location(SubTreeFileSystem(str(tmp_path), LocalFileSystem()), "ledger", "the ledger")
    entries = [(Allocation((number, 1)), Evaluation(number / 7, -1.0)) for number in range(24)]
    with Ledger(place, PRINTS) as first:
        first.append(*entries[0])
        first.flush()
        with Ledger(place, PRINTS) as second:
            for number in range(1, len(entries), 2):
                for ledger, entry in ((second, entries[number]), (first, entries[number - 1])):
                    ledger.append(*entry)
                    ledger.flush()
        with Ledger(place, PRINTS) as third:
            assert len(third) == len(entries)
            third.append(Allocation((99, 1)), ENTRIES[0][1])
    assert sorted(read_ledger(place))[:-1] == entries


def test_a_file_that_somebody_removed_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for entry in ENTRIES[:3]:
        with Ledger(tmp_path / "ledger", PRINTS) as ledger:
            ledger.append(*entry)
    next((tmp_path / "ledger").glob("000000002-*")).unlink()
    with Ledger(tmp_path / "ledger", PRINTS) as ledger:
        assert len(ledger) == 2
    assert "lacks what flush 2 wrote" in caplog.text


def test_a_reader_keeps_up_with_a_writer_that_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, done, counts = tmp_path / "ledger", threading.Event(), [0]

    def read() -> None:
        while not done.is_set():
            counts.append(len(list(read_ledger(folder))))

    with Ledger(folder, PRINTS) as ledger:
        monkeypatch.setattr("lop.search.ledger._MERGE", 4)
        reader = threading.Thread(target=read)
        reader.start()
        for number in range(40):
            ledger.append(Allocation((number,)), ENTRIES[0][1])
            ledger.flush()
        done.set()
        reader.join()
    assert counts == sorted(counts)
    assert len(set(counts)) > 3
