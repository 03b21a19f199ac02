"""Where something cannot be written, that is said before any work, in one line that names the place."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem, SubTreeFileSystem

import lop
from lop.cli import main
from lop.errors import LopError
from lop.report.evaluate import Evaluate, evaluate
from lop.storage.destination import check_new, check_writable
from lop.storage.files import atomic_file, atomic_folder
from lop.storage.location import Location

UNWRITABLE = ("through a file", "too long", "below what is too long", "read-only", "nothing of the kind")


@pytest.fixture
def bad(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A place that cannot be written."""
    kind = request.param
    if kind == "through a file":
        (tmp_path / "file").write_text("")
        yield str(tmp_path / "file" / "folder")
    elif kind == "too long":
        yield str(tmp_path / ("x" * 250))
    elif kind == "below what is too long":
        yield str(tmp_path / ("x" * 300) / "folder")
    elif kind == "nothing of the kind":
        yield "/proc/nothing/folder"
    else:
        fixed = tmp_path / "fixed"
        fixed.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", fixed], capture_output=True).returncode:
            pytest.skip("mounting a read-only disk needs root")
        yield str(fixed / "folder")
        subprocess.run(["umount", fixed], check=True)


def work(*_: Any, **__: Any) -> None:
    raise AssertionError("work was begun")


@pytest.mark.parametrize("bad", UNWRITABLE, indirect=True)
def test_every_entrance_refuses_before_any_work(
    bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        "lop.stages.stages.load_model", "lop.stages.stages.recover_checkpoint", "lop.stages.stages.build_trees",
        "lop.stages.rivals.map_on_workers",
        "lop.report.evaluate._adapter", "lop.client.Client.make",
    ):  # fmt: skip
        monkeypatch.setattr(name, work)
    for command in (
        ["prune", "--target", "0.3", "--out", bad],
        ["calibrate", "--run", bad],
        ["demo", "--run", bad, "--workers", "0"],
        ["search", "--run", bad, "--workers", "0"],
    ):
        assert main(command) == 2, command
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert bad in line
        assert ".partial" not in line
    with pytest.raises(LopError, match="cannot be written"):
        lop.Client("http://127.0.0.1:1").get("tiny", ratio=0.3, out=bad)
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "fixed"}


@pytest.mark.parametrize("bad", ["through a file"], indirect=True)
def test_results_that_could_not_be_kept_are_not_measured(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lmms_eval")
    monkeypatch.setattr("lop.report.evaluate._adapter", work)
    with pytest.raises(LopError, match="is not a folder"):
        evaluate("tiny", ["lop_word"], Evaluate(cache=Path(bad)))


@pytest.mark.parametrize("bad", UNWRITABLE, indirect=True)
def test_storage_of_the_service_is_looked_at_first(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve.app import app
    from serve.settings import ServiceSettings

    monkeypatch.setattr("serve.app.open_store", work)
    with pytest.raises(LopError, match="cannot be written"):
        app(ServiceSettings(storage=Path(bad)))


def test_what_cannot_be_replaced_is_refused(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full" / "of").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, why in {
        "file": "there already", "full": "there already", "link": "is a link", "dangling": "is a link",
        "small": "is mounted",
    }.items():  # fmt: skip
        with pytest.raises(LopError, match=why):
            check_new(Location.parse(tmp_path / name))
    with pytest.raises(LopError, match="no space left for 2,000,000 bytes"):
        check_new(Location.parse(small_disk / "folder"), bytes=2_000_000)
    before = sorted(tmp_path.rglob("*"))
    for good in ("empty", "new", "new/below/folders", "empty/below"):
        check_new(Location.parse(tmp_path / good), bytes=1000)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(LopError, match="empty"):
        Location.parse("")


def test_what_is_in_the_way_of_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("search.json", "ledger"):
        run = tmp_path / f"run-{name}"
        run.mkdir()
        (run / name).mkdir() if "." in name else (run / name).write_text("")
        assert main(["demo", "--run", str(run), "--workers", "0"]) == 2
        assert f"{name} is in the way" in capsys.readouterr().err
        assert [path.name for path in run.iterdir()] == [name]


@settings(max_examples=20)
@given(st.lists(st.text("ab.é ", min_size=1, max_size=200), min_size=1, max_size=3))
def test_what_is_accepted_can_be_written(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    root = tmp_path_factory.getbasetemp() / "accepted"
    root.mkdir(exist_ok=True)
    place = Location.parse(Path(root, *(f"x{part}" for part in parts)))
    try:
        check_new(place)
    except LopError:
        return
    check_writable(place)
    assert os.listdir(root) == []
    with atomic_folder(Path(place.path)) as folder:
        (folder / "file").touch()
    check_writable(place, "file")
    subprocess.run(["rm", "-r", *root.iterdir()], check=True)


class ReadOnly(MemoryFileSystem):
    cachable = False

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            raise PermissionError(f"writing {path} is not allowed")
        return super()._open(path, mode, **options)


def test_other_file_systems_are_tried_too(tmp_path: Path) -> None:
    fixed = Location(PyFileSystem(FSSpecHandler(ReadOnly())), "/bucket/folder", "nosuch://bucket/folder")
    for check in (check_new, check_writable):
        with pytest.raises(LopError, match=r"nosuch://bucket/folder cannot be written: .*not allowed"):
            check(fixed)
    (tmp_path / "file").write_text("")
    filesystem = SubTreeFileSystem("/", LocalFileSystem())
    with pytest.raises(LopError, match="is not a folder"):
        check_new(Location(filesystem, f"{tmp_path}/file/below/folder", "there"))
    memory = PyFileSystem(FSSpecHandler(MemoryFileSystem(skip_instance_cache=True)))
    for place in (Location(filesystem, f"{tmp_path}/a/b", "there"), Location(memory, "/bucket/a/b", "there")):
        check_new(place)
        check_writable(place, "file", "folder/")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_errors_name_what_was_to_be_written(write: Callable[[Path], Any], tmp_path: Path) -> None:
    place = tmp_path / "taken"
    (place / "by").mkdir(parents=True)
    with pytest.raises(OSError, match=str(place)) as told, write(place):
        pass
    assert (told.value.filename, told.value.filename2) == (str(place), None)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
