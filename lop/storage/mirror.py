"""Runs on remote storage: the stages work on a local copy of the small files, and what they write goes back."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lop.storage.files import expanded
from lop.storage.location import Location, is_uri

log = logging.getLogger(__name__)
# What the search, Ray Tune and exports write to the storage themselves, for a run and for its repetitions with other
# seeds; and what is not complete.
_ELSEWHERE = re.compile(r"(seeds/[^/]+/)?(ledger/|tune/|checkpoints/|status\.json$)|.*\.partial$")


@contextmanager
def local_run(place: str) -> Iterator[tuple[Path, Location | None]]:
    """The local folder of a run, and the storage that it is a copy of, if the run is at a URI.

    The copy lasts as long as the block. What is new or changed in it is written back when the block ends, with or
    without an error: a stage that was interrupted keeps what it had.

    Raises:
        LopError: the URI is of no kind that pyarrow knows, or names no bucket that is there.
        OSError: the storage cannot be reached.
    """
    if not is_uri(place):
        yield expanded(place), None
        return
    origin = Location.parse(place)
    origin.check_bucket()
    with TemporaryDirectory(prefix="lop-run-") as name:
        folder = Path(name)
        _download(origin, folder)
        before = _states(folder)
        try:
            yield folder, origin
        finally:
            for file, state in _states(folder).items():
                if before.get(file) != state:
                    origin.write(file, (folder / file).read_bytes())


def _download(origin: Location, folder: Path) -> None:
    names = [name for name in origin.files() if not _ELSEWHERE.match(name)]
    for name, data in zip(names, origin.read_all(names)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _states(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What tells a written file from an untouched one; LOP's files are replaced, not changed."""
    states = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not _ELSEWHERE.match(name):
            stat = path.stat()
            states[name] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return states
