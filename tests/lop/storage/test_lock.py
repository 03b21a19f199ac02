"""One process at a time."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from lop.storage.lock import locked

_HOLD = """
import sys, time
from pathlib import Path
from lop.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_who_is_killed_lets_go_of_it(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "lock"
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(file)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with file.open("a") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder.kill()
        with locked(file):
            assert file.exists()
    with locked(file):  # Again, now that nobody has it.
        pass
