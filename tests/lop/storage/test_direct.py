"""Files past the page cache: what is read is what is there, what is written is what was given."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lop.storage.direct
from lop.errors import LopError
from lop.storage.direct import Extent, NewFile, Reader

DATA = np.random.default_rng(0).bytes(50_001)
EXTENTS = st.lists(
    st.integers(0, len(DATA)).flatmap(lambda start: st.tuples(st.just(start), st.integers(0, len(DATA) - start))),
    max_size=6,
)


def forget(path: Path) -> None:
    """Makes the kernel drop a file from its page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@settings(max_examples=40, deadline=None)
@given(extents=EXTENTS, cached=st.booleans())
def test_an_extent_is_that_part_of_the_file(extents: list[tuple[int, int]], cached: bool) -> None:
    with TemporaryDirectory() as folder, Reader() as reader:
        path = Path(folder) / "data"
        path.write_bytes(DATA)
        if not cached:
            forget(path)
        wanted = [Extent(path, start, count) for start, count in extents]
        found = [block.tobytes() for block in reader.read(wanted)]
        assert found == [DATA[start : start + count] for start, count in extents]


@pytest.mark.parametrize("length", [0, 4096, 5000, 8192])
def test_a_file_that_ends_too_early_is_named(length: int, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(DATA[:length])
    forget(path)
    with Reader() as reader, pytest.raises(LopError, match="data is damaged: it ends within a tensor"):
        list(reader.read([Extent(path, 0, length + 1)]))


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 20_000), max_size=8), collected=st.sampled_from([4096, 12_288, 8 * 2**20]))
def test_a_file_holds_what_was_written(sizes: list[int], collected: int) -> None:
    data = [np.random.default_rng(size).bytes(size) for size in sizes]
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lop.storage.direct, "_COLLECTED", collected)
        path = Path(folder) / "data"
        with NewFile(path) as file:
            for part in data:
                view = memoryview(part)
                while view:
                    view = view[file.write(view) :]
        assert path.read_bytes() == b"".join(data)


@pytest.mark.parametrize("flag", [0, lop.storage.direct._DIRECT], ids=["no direct I/O", "direct I/O"])
def test_file_systems_in_memory_do_as_well(flag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lop.storage.direct, "_DIRECT", flag)
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / "data"
        with NewFile(path) as file:
            file.write(memoryview(DATA))
        with Reader() as reader:
            assert next(reader.read([Extent(path, 7, 10_000)])).tobytes() == DATA[7:10_007]


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        NewFile(path)
    assert path.read_text() == "mine"
