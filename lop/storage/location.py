"""Folders on a local disk or on any storage that pyarrow reads: `s3://`, `gs://`, `abfs://`, `hdfs://`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from lop.errors import LopError, first_line
from lop.storage.files import atomic_file, expanded

# Their puts are atomic; elsewhere a file appears by a rename.
_OBJECT_STORES = ("s3", "gcs", "abfs")
_READERS = 16


def is_uri(text: str) -> bool:
    """Whether a place is named by a URI and not by a path."""
    return "://" in text


@dataclass(frozen=True)
class Location:
    """A folder of files that appear whole or not at all; it need not exist before the first is written.

    Attributes:
        filesystem: pyarrow's.
        path: of the folder, in that filesystem.
        name: as the user knows it, for messages.
    """

    filesystem: FileSystem
    path: str
    name: str

    @classmethod
    def parse(cls, place: "str | Path | Location") -> "Location":
        """A local path or a URI; what is a location already stays as it is.

        Raises:
            LopError: pyarrow does not know the kind of storage, or the name is empty, malformed or of no folder.
        """
        if isinstance(place, Location):
            return place
        text = str(place)
        if not text.strip():
            raise LopError("the name of a folder is empty")
        if not is_uri(text):
            return cls(LocalFileSystem(), str(expanded(text).absolute()), text)
        try:
            filesystem, path = FileSystem.from_uri(text)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise LopError(f"storage {text!r} cannot be opened: {first_line(error)}") from None
        if not path.strip("/"):
            raise LopError(f"storage {text!r} names no folder: write it as {text.partition('://')[0]}://bucket/folder")
        return cls(filesystem, path.rstrip("/"), text)

    def __str__(self) -> str:
        return self.name

    def __truediv__(self, folder: str) -> "Location":
        # A URI may end in a query: the name is for people, and only `path` is opened.
        head, mark, query = self.name.partition("?") if is_uri(self.name) else (self.name, "", "")
        return Location(self.filesystem, f"{self.path}/{folder}", f"{head.rstrip('/')}/{folder}{mark}{query}")

    @property
    def uri(self) -> str:
        """What other programs open it by: an absolute path or a URI."""
        return self.path if self.is_local else self.name

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    @property
    def has_buckets(self) -> bool:
        """Whether files lie in buckets, and folders are but parts of their names."""
        return self.filesystem.type_name in _OBJECT_STORES

    def check_bucket(self) -> None:
        """Tells a missing bucket before hours of work would be written there.

        Raises:
            LopError: the storage has buckets, and this one is not there.
            OSError: the storage cannot be reached.
        """
        bucket = self.path.partition("/")[0]
        if self.has_buckets and self.filesystem.get_file_info(bucket).type == FileType.NotFound:
            raise LopError(f"storage {self.name!r}: there is no bucket {bucket!r}; make it first")

    def files(self) -> list[str]:
        """The names of all files in the folder and below it, sorted; none where there is no folder.

        Raises:
            OSError: the storage cannot be reached.
        """
        selector = FileSelector(self.path, allow_not_found=True, recursive=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.path[len(self.path) + 1 :] for info in infos if info.type == FileType.File)

    def read(self, name: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the storage cannot be reached.
        """
        with self.open(name) as stream:
            return bytes(stream.read())

    def open(self, name: str) -> pa.NativeFile:
        """A file to read from its beginning; to be closed.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the storage cannot be reached.
        """
        return self.filesystem.open_input_stream(f"{self.path}/{name}")

    def has(self, name: str) -> bool:
        """Whether there is such a file.

        Raises:
            OSError: the storage cannot be reached.
        """
        return bool(self.filesystem.get_file_info(f"{self.path}/{name}").type == FileType.File)

    def size(self, name: str) -> int:
        """A file's bytes.

        Raises:
            OSError: the storage cannot be reached.
        """
        return int(self.filesystem.get_file_info(f"{self.path}/{name}").size or 0)

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """Several files at a time, where each takes long to answer.

        Raises:
            FileNotFoundError: one of them is not there.
        """
        if len(names) == 1:
            return [self.read(names[0])]
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self.read, names))

    def write(self, name: str, data: bytes) -> None:
        """Writes a file; readers see all of it or nothing.

        Raises:
            OSError: the disk is full or read-only, or the storage cannot be reached.
        """
        path = f"{self.path}/{name}"
        if self.is_local:
            with atomic_file(Path(path)) as temporary:
                temporary.write_bytes(data)
            return
        in_place = self.has_buckets
        target = path if in_place else f"{path}.partial"
        if not in_place:
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with self.filesystem.open_output_stream(target) as stream:
            stream.write(data)
        if not in_place:
            self.filesystem.move(target, path)

    def delete(self, name: str) -> None:
        """Removes a file.

        Raises:
            OSError: it cannot be removed.
        """
        self.filesystem.delete_file(f"{self.path}/{name}")

    def remove(self) -> None:
        """Removes the folder and everything in it, if there is such a folder.

        Raises:
            OSError: it cannot be removed.
        """
        with suppress(FileNotFoundError):
            self.filesystem.delete_dir(self.path)
