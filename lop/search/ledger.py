"""The durable record of all evaluations: immutable segments of lines, each with a checksum."""

import fcntl
import json
import logging
import os
import secrets
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lop.errors import LopError
from lop.search.evaluation import Evaluation
from lop.search.racing import Candidate
from lop.space.allocation import Allocation
from lop.storage.fingerprint import check_fingerprints
from lop.storage.location import Location

log = logging.getLogger(__name__)
_SUFFIX = ".jsonl"
_FOLDER = "ledger"
# Seconds between two flushes. A put on remote storage is slow and costs money; a small file on a disk does not.
_SECONDS_LOCAL = 0.1
_SECONDS_REMOTE = 2.0
# So many segments of one size are merged into one, which is then one of the next size.
_MERGE = 64

# An allocation that races is evaluated anew against another opponent: both one's widths tell evaluations apart, and on
# which samples.
_Key = tuple[Allocation, tuple[int, ...] | None, bool, int]


@dataclass(frozen=True)
class _Segment:
    """A file of the ledger: its first line is the header, and each other line a record."""

    name: str
    first: int
    last: int
    size: int
    body: bytes

    @property
    def lines(self) -> list[bytes]:
        """The records."""
        return self.body.splitlines(keepends=True)


class Ledger:
    """An append-only set of evaluations, opened for one search.

    `append` collects, and `flush` writes what is collected as one new file that appears whole or not at all, so that
    readers can follow while a search runs. Small files are merged as their number grows. A file's first line holds
    the fingerprints of what the evaluations depend on; each line is a CRC-32, a blank, and a JSON object. Where the
    newest file was cut short, its whole lines are kept; damage anywhere else is an error. A process may be killed
    between any two operations on files: what was flushed stays, and is read once.

    On a local disk a second search is kept out. Remote storage has no locks: two searches there write files of
    different names, and spend time twice without harm.

    Args:
        place: a folder, on a local disk or a URI that pyarrow reads.
        fingerprints: of what the evaluations depend on.
        seconds: between two flushes while results arrive; by default what suits the storage.

    Raises:
        LopError: the ledger is damaged, was made with another model, statistics, samples or settings, or is in use.
        OSError: the ledger cannot be written.
    """

    def __init__(
        self, place: str | Path | Location, fingerprints: Mapping[str, str], *, seconds: float | None = None
    ) -> None:
        self.location = Location.parse(place)
        default = _SECONDS_LOCAL if self.location.is_local else _SECONDS_REMOTE
        self._seconds = default if seconds is None else seconds
        self._writer = secrets.token_hex(4)
        self._header = _line(dict(fingerprints))
        self._pending: dict[_Key, Evaluation] = {}
        self._flushed = float("-inf")
        self._lock = _lock(self.location) if self.location.is_local else None
        try:
            self._open(fingerprints)
        except BaseException:
            self._unlock()
            raise

    def __len__(self) -> int:
        return len(self._known)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            self._unlock()

    def get(self, candidate: Candidate) -> Evaluation | None:
        """The candidate's result, if it is in storage; where it races, against the same opponent.

        One that does not say what each sample is worth is none where that is asked for.
        """
        opponent = candidate.opponent
        widths = None if opponent is None else opponent.allocation.widths
        found = self._known.get((candidate.allocation, widths, candidate.confirms, candidate.few))
        return None if found and candidate.itemised and found.values is None and not found.error else found

    @property
    def due(self) -> float:
        """Seconds until what is collected should be flushed; 0 where it should be now, infinite where nothing is."""
        if not self._pending:
            return float("inf")
        return max(0.0, self._flushed + self._seconds - time.monotonic())

    def append(self, allocation: Allocation, evaluation: Evaluation) -> None:
        """Collects a result; it is in storage after the next `flush`."""
        self._pending[_key(allocation, evaluation)] = evaluation

    def flush(self) -> None:
        """Writes what is collected.

        Raises:
            OSError: the disk is full, or the storage cannot be reached; nothing is half-written, nothing forgotten.
        """
        if not self._pending:
            return
        lines = [_line({"widths": list(a.widths), **e.as_dict()}) for (a, *_), e in self._pending.items()]
        self._write(self._next, self._next, 0, b"".join(lines))
        self._known |= self._pending
        self._pending = {}
        self._flushed = time.monotonic()
        self._merge()

    def _open(self, fingerprints: Mapping[str, str]) -> None:
        segments = _read_segments(self.location)
        for name, data, is_torn in segments:
            if is_torn:
                log.warning("%s/%s ends in the middle of a record: cut to the last whole one", self.location, name)
                self.location.write(name, data or self._header)
        segments = _read_segments(self.location) if any(is_torn for *_, is_torn in segments) else segments
        for name, data, _ in segments:
            check_fingerprints(f"{self.location}/{name}", _records(self.location, name, data)[0], fingerprints)
        self._known = {_key(a, e): e for a, e in _evaluations(self.location, segments)}
        self._segments = [_Segment(name, *_numbers(name), 0, data.partition(b"\n")[2]) for name, data, _ in segments]
        self._next = 1 + max((segment.last for segment in self._segments), default=-1)
        if missing := _missing(self._segments):
            log.warning("%s lacks what flush %s wrote: it is evaluated again", self.location, missing)
        lines = [line for segment in self._segments for line in segment.lines]
        if not segments:
            self._write(0, 0, 0, b"")
        elif len(segments) > _MERGE or len(set(lines)) < len(lines):  # Whoever merged last was killed at it.
            self._replace(self._segments)
        if self.location.is_local:
            _clear_partial(Path(self.location.path))

    def _write(self, first: int, last: int, size: int, body: bytes) -> _Segment:
        segment = _Segment(f"{first:09d}-{last:09d}-{self._writer}{_SUFFIX}", first, last, size, body)
        self.location.write(segment.name, self._header + body)
        self._segments = [*self._segments, segment]
        self._next = max(self._next, last + 1)
        return segment

    def _merge(self) -> None:
        while len(tail := self._segments[-_MERGE:]) == _MERGE and len({segment.size for segment in tail}) == 1:
            self._replace(tail)

    def _replace(self, old: Sequence[_Segment]) -> None:
        """Writes one segment in the place of others; a reader meanwhile sees records twice, never none."""
        # Sorted names give the order of records: the merged one begins where the first of them did.
        first, last = min(segment.first for segment in old), max(segment.last for segment in old)
        lines = dict.fromkeys(line for segment in old for line in segment.lines)
        merged = self._write(first, last, old[-1].size + 1, b"".join(lines))
        gone = [segment.name for segment in old if segment.name != merged.name]
        for name in gone:
            with suppress(FileNotFoundError):  # Another search on the same remote storage may have merged it, too.
                self.location.delete(name)
        self._segments = [segment for segment in self._segments if segment.name not in gone]

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def read_ledger(place: str | Path | Location) -> Iterator[tuple[Allocation, Evaluation]]:
    """All evaluations, in the order in which they were written; a torn last record is left out.

    Raises:
        LopError: there is no ledger, or it is damaged.
    """
    location = Location.parse(place)
    yield from _evaluations(location, _segments(location))


def ledger_header(run: str | Path | Location) -> dict[str, str]:
    """What a run's evaluations depend on, and the `shape` of its space.

    Raises:
        LopError: there is no ledger, or it is damaged.
    """
    location = Location.parse(run) / _FOLDER
    return next(_records(location, name, data)[0] for name, data, _ in _segments(location) if data)


def evaluations(run: str | Path | Location) -> list[dict[str, Any]]:
    """A run's evaluations as plain values: `pandas.DataFrame(lop.evaluations("runs/tiny"))`.

    Columns: `kept` (neurons in all layers), `accuracy`, `log_probability`, `error`, `complete`, `widths`. Where not
    `complete`, a race was given up before all samples were scored (the accuracy is an estimate, and the other numbers
    are of those scored), or it was on the few samples of a descent.

    Args:
        run: the run's folder or URI; a search may be writing there.

    Raises:
        LopError: there is no ledger, or it is damaged.
    """
    return [
        {
            "kept": allocation.budget,
            "accuracy": evaluation.accuracy,
            "log_probability": evaluation.log_probability,
            "error": evaluation.error,
            "complete": evaluation.is_complete and not evaluation.few,
            "widths": list(allocation.widths),
        }
        for allocation, evaluation in read_ledger(Location.parse(run) / _FOLDER)
    ]


def _segments(location: Location) -> list[tuple[str, bytes, bool]]:
    segments = _read_segments(location)
    if not segments:
        raise LopError(f"{location} is missing: run `lop search` first")
    return segments


def _lock(location: Location) -> int:
    """Takes the folder's lock, which the system gives back when the process ends, however it ends."""
    Path(location.path).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(location.path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LopError(f"{location} is being written by another search: wait for it, or name another --run") from None
    return descriptor


def _clear_partial(folder: Path) -> None:
    """Removes what a search left that was killed while it wrote."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def _read_segments(location: Location) -> list[tuple[str, bytes, bool]]:
    """Each segment's name, its whole lines, and whether it was cut short, in the order of their names."""
    while True:
        names = _names(location)
        # Where a segment has been merged since, the list is read anew.
        with suppress(FileNotFoundError):
            contents = location.read_all(names) if names else []
            break
    newest = max(names, key=lambda name: _numbers(name)[1], default=None)
    segments = []
    for name, data in zip(names, contents, strict=True):
        # Elsewhere than in the newest file, a line that is cut short is damage, and its checksum tells.
        is_torn = name == newest and not data.endswith(b"\n")
        if not data and not is_torn:
            raise LopError(f"{location}/{name} is damaged: it has no header")
        whole = data[: data.rfind(b"\n") + 1] if is_torn else data
        segments.append((name, whole, is_torn))
    if segments and all(not whole for _, whole, _ in segments):
        raise LopError(f"{location}/{segments[0][0]} is damaged: it has no header")
    return segments


def _names(location: Location) -> list[str]:
    """All segments, sorted.

    A listing takes a while: it may miss a merged segment that appears meanwhile, and those in whose place it comes. But
    these the listing before it had; so the folder is listed until nothing has gone since the last time.
    """

    def listed() -> list[str]:
        return [name for name in location.files() if name.endswith(_SUFFIX) and not name.startswith(".")]

    before, names = listed(), listed()
    while not set(before) <= set(names):
        before, names = names, listed()
    return names


def _missing(segments: Sequence[_Segment]) -> str:
    """The first flush that no segment holds although a later one is held; empty where all are."""
    covered = -1
    for segment in sorted(segments, key=lambda segment: segment.first):
        if segment.first > covered + 1:
            return str(covered + 1)
        covered = max(covered, segment.last)
    return ""


def _key(allocation: Allocation, evaluation: Evaluation) -> _Key:
    return allocation, evaluation.opponent, bool(evaluation.confirms), evaluation.few or 0


def _numbers(name: str) -> tuple[int, int]:
    """The first and last flush that a segment holds."""
    first, _, rest = name.partition("-")
    try:
        return int(first), int(rest.partition("-")[0])
    except ValueError:
        raise LopError(f"the ledger holds {name}, which is no segment of one: remove it") from None


def _evaluations(
    location: Location, segments: list[tuple[str, bytes, bool]]
) -> Iterator[tuple[Allocation, Evaluation]]:
    found: dict[_Key, tuple[Allocation, Evaluation]] = {}
    for name, data, _ in segments:
        for record in _records(location, name, data)[1:]:
            allocation = Allocation(tuple(record.pop("widths")))
            evaluation = Evaluation.from_dict(record)
            key = _key(allocation, evaluation)
            # Twice, if the search was killed while it merged segments, or if each sample's worth was asked for later.
            if key not in found or (evaluation.values and not found[key][1].values):
                found[key] = allocation, evaluation
    yield from found.values()


def _records(location: Location, name: str, data: bytes) -> list[dict[str, Any]]:
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    return [_parse(f"{location}/{name}", number, line) for number, line in enumerate(lines, start=1)]


def _line(record: Mapping[str, Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _parse(path: str, number: int, line: bytes) -> dict[str, Any]:
    checksum, _, body = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(body):
        raise LopError(f"{path} is damaged: the checksum of line {number} is wrong")
    return dict(json.loads(body))
