"""Where things are written: looked at before there is work to lose; an export appears there whole or not at all.

A destination is a local folder, or one of any file system that pyarrow knows.
"""

import os
import posixpath
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, Protocol

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, SubTreeFileSystem

from lop.errors import LopError, first_line
from lop.storage.direct import NewFile
from lop.storage.files import atomic_file, atomic_folder
from lop.storage.location import Location

# These rename a folder in one step. Object stores do not: what makes a folder there a checkpoint is its last file.
_RENAMING = {"hdfs", "local"}


class NewFolder(Protocol):
    """A folder that is being filled and that nobody sees yet as what it will be."""

    def create(self, name: str) -> IO[bytes]:
        """Opens a new file for writing; closing it makes it complete."""


def check_new(place: Location, *, bytes: int = 0) -> None:
    """Looks whether a new folder can be made at the place; leaves nothing there.

    Args:
        bytes: that it will hold, for local disks.

    Raises:
        LopError: it is there already and not an empty folder, it cannot be written, or there is too little space.
    """
    _check_absent(place)
    if place.is_local:
        free = shutil.disk_usage(_try_locally(place, new=True)).free
        if free < bytes:
            raise LopError(f"{place}: no space left for {bytes:,} bytes: {free:,} are free")
    else:
        _try_remotely(place)


def check_writable(place: Location, *names: str) -> None:
    """Looks whether files can be written into a folder, which need not be there yet; leaves nothing there.

    Args:
        names: of the files that will be written; of folders, with a slash behind.

    Raises:
        LopError: they cannot be written, or a file stands where a folder is to be, or the other way round.
    """
    if place.is_local:
        _try_locally(place, new=False)
    else:
        _try_remotely(place)
    bare = [name.rstrip("/") for name in names]
    found = place.filesystem.get_file_info([f"{place.path}/{name}" for name in bare])
    for name, plain, info in zip(names, bare, found, strict=True):
        kind, wanted = ("folder", FileType.Directory) if name != plain else ("file", FileType.File)
        if info.type not in (FileType.NotFound, wanted):
            raise LopError(f"{place / plain} is in the way: a {kind} of that name is to be written")


def _check_absent(place: Location) -> None:
    try:
        is_file = place.filesystem.get_file_info(place.path).type == FileType.File
        if is_file or place.filesystem.get_file_info(FileSelector(place.path, allow_not_found=True)):
            raise LopError(f"{place} is there already: name a new folder, or remove it first")
    except OSError as error:
        raise _unwritable(place, error) from None
    # Neither can be replaced by a folder, even if empty.
    if place.is_local and os.path.islink(place.path):
        raise LopError(f"{place} is a link: name the folder that it stands for")
    if place.is_local and os.path.ismount(place.path):
        raise LopError(f"{place} is where a disk is mounted, and cannot be replaced: name a new folder inside it")


def _try_locally(place: Location, *, new: bool) -> Path:
    """Writes what will be written, in a temporary folder as near to the place as there is one, which it returns.

    Only that tells: permissions do not apply to root, nor do they know of file systems that are read-only, and how long
    a name may be is for the file system to say.
    """
    path = Path(place.path)
    base = path.parent if new else path
    while not os.path.lexists(base):
        base = base.parent
    if not base.is_dir():
        raise LopError(f"{place} cannot be written: {base} is not a folder")
    rest = path.relative_to(base)
    try:
        with TemporaryDirectory(prefix=f".{rest.name or 'lop'}.", suffix=".partial", dir=base) as trial:
            if new:
                with atomic_folder(Path(trial) / rest) as folder:
                    (folder / "config.json").touch()
            else:
                with atomic_file(Path(trial) / rest / "config.yaml"):
                    pass
    except OSError as error:
        raise _unwritable(place, error) from None
    return base


def _try_remotely(place: Location) -> None:
    """Writes and removes an empty file beside the place."""
    place.check_bucket()
    filesystem, base = place.filesystem, place.path
    try:
        if not place.has_buckets:  # In a bucket there are no folders, and what one may write depends on the name.
            base = posixpath.dirname(base)
            while (found := filesystem.get_file_info(base).type) == FileType.NotFound and base.strip("/"):
                base = posixpath.dirname(base)
            if found == FileType.File:
                raise LopError(f"{place} cannot be written: {base} is not a folder")
            base = posixpath.join(base, posixpath.basename(place.path))
        trial = f"{base}.{uuid.uuid4().hex}.partial"
        with filesystem.open_output_stream(trial):
            pass
    except (OSError, pa.ArrowException) as error:
        raise _unwritable(place, error) from None
    with suppress(OSError):  # One may be allowed to write and not to remove.
        filesystem.delete_file(trial)


def _unwritable(place: Location, error: Exception) -> LopError:
    return LopError(f"{place} cannot be written: {getattr(error, 'strerror', None) or first_line(error)}")


@contextmanager
def new_folder(place: Location) -> Iterator[NewFolder]:
    """Yields a folder to fill, which becomes the place when the block ends without an error.

    On file systems that cannot rename a folder (object stores) the files are written in place. There the last file
    created makes the folder what it is: write it last (for a checkpoint, `config.json`).

    Raises:
        LopError: the place is there already and not an empty folder.
        OSError: the disk is full or read-only; nothing is left behind.
    """
    _check_absent(place)
    filesystem, path = place.filesystem, place.path
    if place.is_local:
        with atomic_folder(Path(path)) as local:
            yield _Local(local)
        return
    renames = _base(filesystem).type_name in _RENAMING
    hidden = posixpath.join(posixpath.dirname(path), f".{posixpath.basename(path)}.{uuid.uuid4().hex}.partial")
    folder = hidden if renames else path
    try:
        filesystem.create_dir(folder, recursive=True)
        yield _Remote(filesystem, folder)
        if renames:
            if filesystem.get_file_info(path).type == FileType.Directory:
                filesystem.delete_dir(path)
            filesystem.move(folder, path)
    except BaseException:
        _discard(filesystem, folder)
        raise


class _Local:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self, name: str) -> Any:
        return NewFile(self._folder / name)


class _Remote:
    def __init__(self, filesystem: FileSystem, path: str) -> None:
        self._filesystem = filesystem
        self._path = path

    def create(self, name: str) -> Any:
        return self._filesystem.open_output_stream(posixpath.join(self._path, name))


def _base(filesystem: FileSystem) -> FileSystem:
    return _base(filesystem.base_fs) if isinstance(filesystem, SubTreeFileSystem) else filesystem


def _discard(filesystem: FileSystem, path: str) -> None:
    """Removes what an export that failed has written, as far as the file system lets it."""
    try:
        filesystem.delete_dir(path)
    except OSError:
        return
