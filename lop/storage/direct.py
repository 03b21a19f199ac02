"""Large files read and written past the page cache, where the file system can do that.

What passes through the cache costs a core more time than hashing it does, and is not looked up there again.
"""

import ctypes
import errno
import fcntl
import io
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lop.errors import LopError

# Direct reads begin and end at multiples of the disk's blocks, mappings at multiples of a page.
_BLOCK = max(4096, mmap.PAGESIZE)
_DIRECT = getattr(os, "O_DIRECT", 0)  # Not on macOS.
_COLLECTED = 8 * 2**20
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Extent:
    """A part of a file: `count` bytes from `start`."""

    file: Path
    start: int
    count: int


class Reader:
    """Reads extents into buffers of its own, the next one while the one before it is used.

    What is in the page cache already is taken from there.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[tuple[Path, int], int] = {}
        self._buffers = [_aligned(0), _aligned(0)]
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()  # Before the files are closed that it reads.
        self._stack.close()

    def read(self, extents: Iterable[Extent]) -> Iterator[np.ndarray]:
        """Yields each extent's bytes, in order; they stay until the next ones are asked for.

        Raises:
            LopError: a file ends within an extent.
        """
        ahead: Future[np.ndarray] | None = None
        for number, extent in enumerate(extents):
            following = self._thread.submit(self._read, extent, number % 2)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()

    def _read(self, extent: Extent, number: int) -> np.ndarray:
        begin = extent.start - extent.start % _BLOCK
        end = -(-(extent.start + extent.count) // _BLOCK) * _BLOCK
        if len(self._buffers[number]) < end - begin:
            self._buffers[number] = _aligned(end - begin)
        buffer = self._buffers[number][: end - begin]
        needed = extent.start + extent.count - begin
        done = 0
        while done < needed:
            count = self._fill(extent.file, begin + done, buffer[done:])
            done += count
            if done < needed and (count == 0 or done % _BLOCK):
                raise LopError(f"{extent.file} is damaged: it ends within a tensor")
        return np.frombuffer(buffer, np.uint8)[extent.start - begin : needed]

    def _fill(self, file: Path, start: int, buffer: memoryview) -> int:
        if _DIRECT and not _is_cached(self._open(file), start, len(buffer)):
            try:
                return os.preadv(self._open(file, _DIRECT), [buffer], start)
            except OSError as error:
                if error.errno != errno.EINVAL:  # What file systems say that cannot.
                    raise
        return os.preadv(self._open(file), [buffer], start)

    def _open(self, file: Path, flags: int = 0) -> int:
        if (file, flags) not in self._files:
            self._files[file, flags] = os.open(file, os.O_RDONLY | flags)
            self._stack.callback(os.close, self._files[file, flags])
        return self._files[file, flags]


class NewFile(io.RawIOBase):
    """A new file that is written directly: what is given to it is collected in a buffer, and goes to the disk with it.

    Raises:
        FileExistsError: it is there already.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(path, flags, 0o644)
        self._buffer = _aligned(_COLLECTED)
        self._filled = 0
        self._set_direct(_DIRECT)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Takes as much as the buffer has room for.

        Raises:
            OSError: the disk is full or read-only.
        """
        if self._filled == len(self._buffer):
            self._empty()
        count = min(len(data), len(self._buffer) - self._filled)
        self._buffer[self._filled : self._filled + count] = data[:count]
        self._filled += count
        return count

    def close(self) -> None:
        """Writes what is left.

        Raises:
            OSError: the disk is full or read-only.
        """
        if self.closed:
            return
        super().close()
        try:
            self._set_direct(0)  # The last bytes need not fill a block.
            self._empty()
        finally:
            os.close(self._descriptor)

    def _empty(self) -> None:
        view = self._buffer[: self._filled]
        self._filled = 0
        while view:
            try:
                view = view[os.write(self._descriptor, view) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._set_direct(0)

    def _set_direct(self, flag: int) -> None:
        """Switches direct writing on or off; a file system that cannot says so here or at the first write."""
        self._is_direct = bool(flag)
        with suppress(OSError):
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_DIRECT
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | flag)


def _aligned(count: int) -> memoryview:
    """New memory that begins at a multiple of the page size."""
    return memoryview(mmap.mmap(-1, max(count, 1)))


def _is_cached(descriptor: int, start: int, count: int) -> bool:
    """Whether most of a part of a file is in the page cache; asked of mincore(2), which only looks."""
    count = min(count, os.fstat(descriptor).st_size - start)
    if count <= 0:
        return False
    mapped = np.frombuffer(mmap.mmap(descriptor, count, prot=mmap.PROT_READ, offset=start), np.uint8)
    pages = np.zeros(-(-count // mmap.PAGESIZE), np.uint8)
    place, found = (ctypes.c_void_p(array.ctypes.data) for array in (mapped, pages))
    return not _LIBC.mincore(place, ctypes.c_size_t(count), found) and bool((pages & 1).mean() > 0.5)
