"""Safetensors files written as a stream: the memory used is a few reused buffers, whatever the file's size.

The safetensors library writes a file only from tensors that are all in memory. The format is simple enough to be
written from its description: eight bytes with the header's length, a JSON header, and the tensors' bytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO

import numpy as np

from lop.storage.direct import Extent, Reader
from lop.storage.headers import TensorInfo

CHUNK = 8 * 2**20
_SLOTS = 12


@dataclass(frozen=True)
class Cut:
    """A tensor to write: a source tensor, or some of its rows or columns, with zeros up to the shape.

    Attributes:
        source: where the bytes are.
        shape: of the tensor written.
        rows: which rows of the source come first, in this order; None takes all.
        columns: the same for columns; a tensor is cut by rows or by columns, not by both.
    """

    source: TensorInfo
    shape: tuple[int, ...]
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.source.item_bytes

    @property
    def padding(self) -> int:
        """How many of its numbers are zeros that fill it up to the shape."""
        count = int(np.prod(self.shape, dtype=np.int64))
        for axis, chosen in enumerate((self.rows, self.columns)):
            if chosen is not None and count:
                return count // self.shape[axis] * (self.shape[axis] - len(chosen))
        return 0


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint: its name and its tensors in the order of their bytes."""

    name: str
    cuts: tuple[tuple[str, Cut], ...]

    @property
    def header(self) -> bytes:
        """The file's first bytes, up to where the tensors begin."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, cut in self.cuts:
            start, end = end, end + cut.bytes
            entries[name] = {"dtype": cut.source.dtype, "shape": cut.shape, "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def plan_shards(cuts: Sequence[tuple[str, Cut]], limit: int) -> list[Shard]:
    """Divides tensors into files of at most `limit` bytes, named as transformers names them."""
    groups: list[list[tuple[str, Cut]]] = [[]]
    size = 0
    for name, cut in cuts:
        if groups[-1] and size + cut.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append((name, cut))
        size += cut.bytes
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    # Wide types first, so that every tensor starts at a multiple of its item's size.
    return [
        Shard(name, tuple(sorted(group, key=lambda item: -item[1].source.item_bytes)))
        for name, group in zip(names, groups)
    ]


@dataclass(frozen=True)
class _Block:
    """What is read at a time, and how many rows (bytes, where nothing is cut) of what is written come of it."""

    cut: Cut
    count: int
    extent: Extent


def _blocks(cut: Cut) -> Iterator[_Block]:
    """A tensor's blocks. Rows are chosen from anywhere, so a tensor that is cut by rows is one block."""
    if not cut.bytes:
        return
    if cut.rows is not None:
        yield _Block(cut, cut.shape[0], Extent(cut.source.file, cut.source.offset, cut.source.bytes))
        return
    length, source_width, width = cut.bytes, 1, 1
    if cut.columns is not None:
        length, item = cut.shape[0], cut.source.item_bytes
        source_width, width = cut.source.shape[1] * item, cut.shape[1] * item
    step = max(CHUNK // max(source_width, width), 1)
    for first in range(0, length, step):
        count = min(step, length - first)
        start = cut.source.offset + first * source_width
        yield _Block(cut, count, Extent(cut.source.file, start, count * source_width))


class ShardWriter:
    """Writes shards of one checkpoint, hashing them on the way: no file is read a second time.

    Reading, gathering, writing and hashing overlap, each in a thread of its own: the caller's thread gathers what the
    reader brings into one buffer of a ring after another. Sources are not mapped, as mapped pages count as the
    process's own memory.
    """

    def __init__(self, on_bytes: Callable[[int], None]) -> None:
        self._on_bytes = on_bytes
        self._stack = ExitStack()
        self._reader = self._stack.enter_context(Reader())
        self._threads = [self._stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2)]
        self._ring = [np.empty(CHUNK, np.uint8) for _ in range(_SLOTS)]
        self._pending: list[list[Future[None]]] = [[] for _ in range(_SLOTS)]
        self._slot = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for futures in self._pending:
            for future in futures:
                future.cancel()
        self._stack.close()

    def write(self, file: IO[bytes], shard: Shard) -> str:
        """Writes a whole shard and returns its hexadecimal SHA-256.

        Raises:
            LopError: a source file ends too early.
            OSError: the disk is full or read-only.
        """
        digest = hashlib.sha256()
        write_all(file, memoryview(shard.header))
        digest.update(shard.header)

        def send(count: int) -> None:
            view = self._ring[self._slot].data[:count]
            actions = (lambda: write_all(file, view), lambda: digest.update(view))
            self._pending[self._slot] = [thread.submit(action) for thread, action in zip(self._threads, actions)]
            self._slot = (self._slot + 1) % _SLOTS
            self._on_bytes(count)

        blocks = [block for _, cut in shard.cuts for block in _blocks(cut)]
        for block, source in zip(blocks, self._reader.read(block.extent for block in blocks)):
            if block.cut.rows is not None:
                self._gather_rows(block.cut, block.cut.rows, source, send)
            elif block.cut.columns is not None:
                self._gather_columns(block, block.cut.columns, source, send)
            else:
                self._buffer()[: len(source)] = source
                send(len(source))
        for slot in range(_SLOTS):
            self._wait(slot)
        return digest.hexdigest()

    def _buffer(self) -> np.ndarray:
        self._wait(self._slot)
        return self._ring[self._slot]

    def _wait(self, slot: int) -> None:
        for future in self._pending[slot]:
            future.result()

    def _gather_rows(self, cut: Cut, rows: np.ndarray, source: np.ndarray, send: Callable[[int], None]) -> None:
        source = source.reshape(cut.source.shape[0], -1)
        step = max(CHUNK // source.shape[1], 1)
        for start in range(0, cut.shape[0], step):
            count = min(step, cut.shape[0] - start)
            into = self._buffer()[: count * source.shape[1]].reshape(count, -1)
            chosen = rows[start : start + count]
            # Any other mode takes through a copy of `out`; the indices are known to be within bounds.
            np.take(source, chosen, axis=0, out=into[: len(chosen)], mode="clip")
            into[len(chosen) :] = 0
            send(into.size)

    def _gather_columns(
        self, block: _Block, columns: np.ndarray, source: np.ndarray, send: Callable[[int], None]
    ) -> None:
        kind = np.dtype(f"u{block.cut.source.item_bytes}")
        size = block.count * block.cut.shape[1] * kind.itemsize
        into = self._buffer()[:size].view(kind).reshape(block.count, -1)
        matrix = source.view(kind).reshape(block.count, -1)
        np.take(matrix, columns, axis=1, out=into[:, : len(columns)], mode="clip")
        into[:, len(columns) :] = 0
        send(size)


def write_all(file: IO[bytes], view: memoryview) -> None:
    """Writes all of `view` to a file of any kind.

    Raises:
        OSError: the disk is full or read-only.
    """
    while view:
        # A raw file may take less than it is given; the streams of other file systems take all and return nothing.
        view = view[file.write(view) or len(view) :]
