"""The durable record of all evaluations: one line each, with a checksum."""

import fcntl
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lop.allocation import Allocation
from lop.errors import LopError
from lop.evaluator import Evaluation
from lop.files import atomic_file
from lop.fingerprint import check_fingerprints

log = logging.getLogger(__name__)


class Ledger:
    """An append-only file of evaluations, opened for one search.

    The first line holds the fingerprints of what the evaluations depend on. Each line is a CRC-32, a blank, and a JSON
    object. A line cut short by a crash is dropped when the file is opened again; damage anywhere else is an error.

    Raises:
        LopError: the file is damaged, or was made with another model, statistics, samples or settings.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, fingerprints: Mapping[str, str]) -> None:
        self.path = path
        if not path.exists():
            with atomic_file(path) as temporary:
                temporary.write_bytes(_line(dict(fingerprints)))
        self._file = path.open("ab", buffering=0)
        self._lock()
        check_fingerprints(str(path), _cut_torn_tail(path), fingerprints)
        self._known = dict(read_ledger(path))

    def __len__(self) -> int:
        return len(self._known)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, allocation: Allocation) -> Evaluation | None:
        """The allocation's result, if it has been evaluated."""
        return self._known.get(allocation)

    def append(self, allocation: Allocation, evaluation: Evaluation) -> None:
        """Records a result; it is on the disk when this returns.

        Raises:
            OSError: the disk is full; the file ends with its last whole record.
        """
        line = _line({"widths": list(allocation.widths), **evaluation.as_dict()})
        # Not tell(): after a failed append it points past the end that the file was cut back to.
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(f"no space left on the disk of {self.path}")
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise
        self._known[allocation] = evaluation

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LopError(
                f"{self.path} is being written by another search: wait for it, or name another --run"
            ) from None


def read_ledger(path: Path) -> Iterator[tuple[Allocation, Evaluation]]:
    """All whole records, in the order in which they were written; a torn last line is left out.

    Raises:
        LopError: the file is missing or damaged.
    """
    for record in _records(path)[1:]:
        widths = record.pop("widths")
        yield Allocation(tuple(widths)), Evaluation(**record)


def _cut_torn_tail(path: Path) -> dict[str, str]:
    """Truncates the file to its last whole line, and returns the header."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        log.warning("%s ends in the middle of a record: cut to the last whole one", path)
        os.truncate(path, end)
    return _records(path)[0]


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        raise LopError(f"{path} is missing: run `lop search` first") from None
    records = [_parse(path, number, line) for number, line in enumerate(lines, start=1)]
    if not records:
        raise LopError(f"{path} is damaged: it has no header")
    return records


def _line(record: Mapping[str, Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    checksum, _, body = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(body):
        raise LopError(f"{path} is damaged: the checksum of line {number} is wrong")
    return dict(json.loads(body))
