import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lop
from lop.errors import LopError
from lop.search.evaluation import Evaluation
from lop.search.ledger import Ledger, read_ledger
from lop.search.racing import Candidate, pack_values
from lop.search.watch import print_ledger
from lop.space.allocation import Allocation
from lop.storage.location import Location

PRINTS = {"model": "aaaa", "reward samples": "bbbb"}
ENTRIES = [(Allocation((8 * n, 16)), Evaluation(n / 7, -n / 3)) for n in range(1, 5)]


def write(folder: Path) -> Path:
    """A ledger of one segment, and that segment."""
    with Ledger(folder, PRINTS) as ledger:
        for allocation, evaluation in ENTRIES:
            ledger.append(allocation, evaluation)
    (_, segment) = sorted(folder.iterdir())
    return segment


def test_records_come_back_to_the_last_bit(tmp_path: Path) -> None:
    write(tmp_path / "ledger")
    assert list(read_ledger(tmp_path / "ledger")) == ENTRIES
    with Ledger(tmp_path / "ledger", PRINTS) as ledger:
        assert len(ledger) == len(ENTRIES)
        assert ledger.get(Candidate(ENTRIES[2][0])) == ENTRIES[2][1]
        assert ledger.get(Candidate(Allocation((1, 1)))) is None


def test_a_torn_tail_is_cut_to_the_last_whole_record(tmp_path: Path) -> None:
    segment = write(tmp_path / "ledger")
    whole = segment.read_bytes()
    last, header = whole[:-1].rfind(b"\n") + 1, whole.find(b"\n") + 1
    for end in (*range(last, len(whole)), *range(0, header + 1, 7)):
        folder = tmp_path / f"torn{end}"
        shutil.copytree(tmp_path / "ledger", folder)
        (folder / segment.name).write_bytes(whole[:end])
        kept = ENTRIES[:-1] if end >= last else []
        assert list(read_ledger(folder)) == kept
        with Ledger(folder, PRINTS) as ledger:
            for entry in ENTRIES[len(kept) :]:
                ledger.append(*entry)
        assert list(read_ledger(folder)) == ENTRIES


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_a_flipped_byte_is_named_by_its_line(tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path / "ledger", ignore_errors=True)
    segment = write(tmp_path / "ledger")
    whole = bytearray(segment.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 2))
    flip = data.draw(st.integers(1, 255))
    whole[place] ^= flip
    segment.write_bytes(whole)
    line = bytes(whole[:place]).count(b"\n") + 1
    with pytest.raises(LopError, match=rf"{segment.name} is damaged: .* line {line} is wrong$") as caught:
        list(read_ledger(tmp_path / "ledger"))
    assert "\n" not in str(caught.value)


def test_an_older_segment_that_is_cut_short_is_damage(tmp_path: Path) -> None:
    segment = write(tmp_path / "ledger")
    with Ledger(tmp_path / "ledger", PRINTS) as ledger:
        ledger.append(Allocation((8, 8)), ENTRIES[0][1])
    segment.write_bytes(segment.read_bytes()[:-3])
    with pytest.raises(LopError, match=f"{segment.name} is damaged"):
        list(read_ledger(tmp_path / "ledger"))


@pytest.mark.parametrize("name", PRINTS)
def test_what_differs_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "ledger")
    with pytest.raises(LopError, match=f"another {name} ") as caught:
        Ledger(tmp_path / "ledger", {**PRINTS, name: "cccc"})
    assert "\n" not in str(caught.value)


def test_an_empty_file_and_a_missing_one_are_named(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "000000000-000000000-aaaaaaaa.jsonl").write_bytes(b"")
    with pytest.raises(LopError, match="no header"):
        Ledger(tmp_path / "ledger", PRINTS)
    with pytest.raises(LopError, match="is missing"):
        list(read_ledger(tmp_path / "nothing"))


def test_a_full_disk_leaves_whole_records(small_disk: Path) -> None:
    path = small_disk / "ledger"
    with Ledger(path, PRINTS) as ledger:
        ballast = small_disk / "ballast"
        ballast.write_bytes(b"0" * (900 << 10))
        written = _fill(ledger)
        assert 0 < written == len(list(read_ledger(path)))
        ballast.unlink()
    # What could not be written was not forgotten.
    assert len(list(read_ledger(path))) == written + 1
    assert all(file.suffix == ".jsonl" for file in path.iterdir())


LIMITED = """
import resource, sys
from pathlib import Path
from tests.lop.search.test_ledger import ENTRIES, PRINTS
from lop.search.ledger import Ledger, read_ledger

path = Path(sys.argv[1])
with Ledger(path, PRINTS) as ledger:
    ledger.append(*ENTRIES[0])
    ledger.flush()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ledger.append(*ENTRIES[1])
    for most in (20, 70, 0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            ledger.flush()
        except OSError:
            assert list(read_ledger(path)) == ENTRIES[:1], most
        else:
            raise AssertionError("there was room")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ledger.append(*ENTRIES[2])
assert list(read_ledger(path)) == ENTRIES[:3]
"""


def test_failed_flushes_leave_whole_records_and_a_ledger_that_still_works(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "ledger")], check=True, timeout=60)


def _fill(ledger: Ledger) -> int:
    """Appends and flushes until the disk is full, and returns how many flushes succeeded."""
    for number in range(100_000):
        ledger.append(Allocation((number,)), ENTRIES[0][1])
        try:
            ledger.flush()
        except OSError as error:
            assert "space" in str(error)
            return number
    raise AssertionError("the disk never filled")


def test_an_older_segment_that_is_empty_is_damage(tmp_path: Path) -> None:
    segment = write(tmp_path / "ledger")
    segment.with_name("000000000-000000000-aaaaaaaa.jsonl").write_bytes(b"")
    with pytest.raises(LopError, match=r"-aaaaaaaa\.jsonl is damaged: it has no header"):
        list(read_ledger(tmp_path / "ledger"))


def test_results_are_not_known_before_they_are_in_storage(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger", PRINTS, seconds=60) as ledger:
        assert math.isinf(ledger.due)
        ledger.append(*ENTRIES[0])
        assert ledger.due == 0
        assert ledger.get(Candidate(ENTRIES[0][0])) is None
        ledger.flush()
        assert ledger.get(Candidate(ENTRIES[0][0])) == ENTRIES[0][1]
        ledger.append(*ENTRIES[1])
        assert 50 < ledger.due <= 60


def test_failures_are_recorded_with_their_error(tmp_path: Path) -> None:
    failed = Evaluation.failed("MemoryError: the card is full")
    with Ledger(tmp_path / "ledger", {**PRINTS, "shape": "2x64"}) as ledger:
        ledger.append(Allocation((8, 8)), failed)
        ledger.append(*ENTRIES[0])
    assert dict(read_ledger(tmp_path / "ledger"))[Allocation((8, 8))] == failed
    frame = pandas.DataFrame(lop.evaluations(tmp_path))
    assert list(frame.columns) == ["kept", "accuracy", "log_probability", "error", "complete", "widths"]
    assert list(frame["error"]) == [failed.error, ""]
    assert list(frame["kept"]) == [16, 24]


def test_a_race_that_was_given_up_is_told_from_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given_up = Evaluation(0.9, -0.1, opponent=(8, 16), scored=5)
    with Ledger(tmp_path / "ledger", {**PRINTS, "shape": "2x64"}) as ledger:
        ledger.append(*ENTRIES[0])
        ledger.append(Allocation((16, 8)), given_up)
    assert [row["complete"] for row in lop.evaluations(tmp_path)] == [True, False]
    print_ledger(Location.parse(tmp_path))
    _, measured, estimated = capsys.readouterr().out.splitlines()
    assert "estimated" not in measured
    assert estimated.endswith("given up: estimated")


def test_what_does_not_say_each_samples_worth_is_none_where_that_is_asked_for(tmp_path: Path) -> None:
    allocation = Allocation((8, 8))
    plain, asked = Candidate(allocation), Candidate(allocation, itemised=True)
    with Ledger(tmp_path / "ledger", {}) as ledger:
        ledger.append(allocation, Evaluation(0.5, -1.0, divergence=1.0))
        ledger.flush()
        assert ledger.get(plain)
        assert not ledger.get(asked)
        told = Evaluation(0.5, -1.0, divergence=1.0, values=pack_values(np.ones(3)))
        ledger.append(allocation, told)
        ledger.flush()
        assert ledger.get(plain) == ledger.get(asked) == told
    with Ledger(tmp_path / "ledger", {}) as ledger:
        assert ledger.get(asked) == told


def test_ten_thousand_evaluations_are_read_back(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    entries = [
        (Allocation(tuple(row)), Evaluation(0.5, -1.0)) for row in random.integers(1, 999, (10_000, 28)).tolist()
    ]
    with Ledger(tmp_path / "ledger", PRINTS) as ledger:
        for start in range(0, len(entries), 2500):
            for entry in entries[start : start + 2500]:
                ledger.append(*entry)
            ledger.flush()
    assert list(read_ledger(tmp_path / "ledger")) == entries


def test_a_second_search_is_kept_out(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger", PRINTS), pytest.raises(LopError, match="another search"):
        Ledger(tmp_path / "ledger", PRINTS)
    with Ledger(tmp_path / "ledger", PRINTS) as ledger:
        assert len(ledger) == 0
