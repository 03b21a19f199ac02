import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lop.allocation import Allocation
from lop.errors import LopError
from lop.evaluator import Evaluation
from lop.ledger import Ledger, read_ledger

PRINTS = {"model": "aaaa", "reward samples": "bbbb"}
ENTRIES = [(Allocation((8 * n, 16)), Evaluation(n / 7, -n / 3)) for n in range(1, 5)]


def write(path: Path) -> bytes:
    with Ledger(path, PRINTS) as ledger:
        for allocation, evaluation in ENTRIES:
            ledger.append(allocation, evaluation)
    return path.read_bytes()


def test_records_come_back_to_the_last_bit(tmp_path: Path) -> None:
    write(tmp_path / "ledger")
    assert list(read_ledger(tmp_path / "ledger")) == ENTRIES
    with Ledger(tmp_path / "ledger", PRINTS) as ledger:
        assert len(ledger) == len(ENTRIES)
        assert ledger.get(ENTRIES[2][0]) == ENTRIES[2][1]
        assert ledger.get(Allocation((1, 1))) is None


def test_a_torn_tail_is_cut_to_the_last_whole_record(tmp_path: Path) -> None:
    whole = write(tmp_path / "ledger")
    last = whole[:-1].rfind(b"\n") + 1
    for end in range(last, len(whole)):
        path = tmp_path / f"torn{end}"
        path.write_bytes(whole[:end])
        assert list(read_ledger(path)) == ENTRIES[:-1]
        with Ledger(path, PRINTS) as ledger:
            ledger.append(*ENTRIES[-1])
        assert path.read_bytes() == whole


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_a_flipped_byte_is_named_by_its_line(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "ledger"
    path.unlink(missing_ok=True)
    whole = bytearray(write(path))
    place = data.draw(st.integers(0, len(whole) - 2))
    flip = data.draw(st.integers(1, 255))
    whole[place] ^= flip
    path.write_bytes(whole)
    line = bytes(whole[:place]).count(b"\n") + 1
    with pytest.raises(LopError, match=rf"line {line} is wrong$") as caught:
        list(read_ledger(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRINTS)
def test_what_differs_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "ledger")
    with pytest.raises(LopError, match=f"another {name} ") as caught:
        Ledger(tmp_path / "ledger", {**PRINTS, name: "cccc"})
    assert "\n" not in str(caught.value)


def test_an_empty_file_and_a_missing_one_are_named(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_bytes(b"")
    with pytest.raises(LopError, match="no header"):
        Ledger(tmp_path / "ledger", PRINTS)
    with pytest.raises(LopError, match="is missing"):
        list(read_ledger(tmp_path / "nothing"))


def test_a_full_disk_leaves_whole_records(small_disk: Path) -> None:
    path = small_disk / "ledger"
    with Ledger(path, PRINTS) as ledger:
        (small_disk / "ballast").write_bytes(b"0" * (960 << 10))
        written = _fill(ledger)
    assert 0 < written == len(list(read_ledger(path)))
    assert json.loads(path.read_bytes().splitlines()[0].partition(b" ")[2]) == PRINTS


LIMITED = """
import resource, sys
from pathlib import Path
from tests.lop.test_ledger import ENTRIES, PRINTS
from lop.ledger import Ledger, read_ledger

path = Path(sys.argv[1])
with Ledger(path, PRINTS) as ledger:
    ledger.append(*ENTRIES[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for more in (20, 30, 0):
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, limits[1]))
        try:
            ledger.append(*ENTRIES[1])
        except OSError:
            assert list(read_ledger(path)) == ENTRIES[:1] and path.read_bytes().endswith(b"\\n"), more
        else:
            raise AssertionError("there was room")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ledger.append(*ENTRIES[2])
assert list(read_ledger(path)) == [ENTRIES[0], ENTRIES[2]]
"""


def test_failed_appends_leave_whole_records_and_a_ledger_that_still_works(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "ledger")], check=True, timeout=60)


def _fill(ledger: Ledger) -> int:
    """Appends until the disk is full, and returns how many appends succeeded."""
    for number in range(100_000):
        try:
            ledger.append(Allocation((number,)), ENTRIES[0][1])
        except OSError as error:
            assert "space" in str(error)
            return number
    raise AssertionError("the disk never filled")


def test_a_second_search_is_kept_out(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger", PRINTS), pytest.raises(LopError, match="another search"):
        Ledger(tmp_path / "ledger", PRINTS)
    with Ledger(tmp_path / "ledger", PRINTS) as ledger:
        assert len(ledger) == 0
