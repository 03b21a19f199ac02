"""Where an export goes: a local folder, or one of any file system that pyarrow knows; whole or not at all."""

import posixpath
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from pyarrow.fs import FileSelector, FileSystem, FileType, SubTreeFileSystem

from lop.direct import NewFile
from lop.errors import LopError
from lop.files import atomic_folder
from lop.storage import Location

# These rename a folder in one step. Object stores do not: what makes a folder there a checkpoint is its last file.
_RENAMING = {"hdfs", "local"}


class NewFolder(Protocol):
    """A folder that is being filled and that nobody sees yet as what it will be."""

    def create(self, name: str) -> IO[bytes]:
        """Opens a new file for writing; closing it makes it complete."""


def check_absent(place: Location) -> None:
    """Looks before anything is done for nothing.

    Raises:
        LopError: it is there already and not an empty folder.
    """
    is_file = place.filesystem.get_file_info(place.path).type == FileType.File
    if is_file or place.filesystem.get_file_info(FileSelector(place.path, allow_not_found=True)):
        raise LopError(f"{place} is there already: name a new folder, or remove it first")


@contextmanager
def new_folder(place: Location) -> Iterator[NewFolder]:
    """Yields a folder to fill, which becomes the place when the block ends without an error.

    On file systems that cannot rename a folder (object stores) the files are written in place. There the last file
    created makes the folder what it is: write it last (for a checkpoint, `config.json`).

    Raises:
        LopError: the place is there already and not an empty folder.
        OSError: the disk is full or read-only; nothing is left behind.
    """
    check_absent(place)
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
