"""Runs on storage that is reached by URI: a local copy inside the block, and what changed back at its end."""

from pathlib import Path

import pytest

from lop.errors import LopError
from lop.storage.mirror import local_run

KEPT = {"config.yaml": b"model: tiny", "predictor/weights": b"1", "seeds/1/search.json": b"{}"}
ELSEWHERE = ("ledger/0.jsonl", "tune/a", "checkpoints/0.5/config.json", "seeds/1/ledger/0.jsonl", "status.json")


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    folder = tmp_path / "storage"
    for name, data in {**KEPT, **dict.fromkeys(ELSEWHERE, b"large")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_local_folder_is_the_run_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with local_run(str(tmp_path / "run")) as found:
        assert found == (tmp_path / "run", None)
    with local_run("~/run") as found:
        assert found == (tmp_path / "run", None)


def test_small_files_come_along_and_only_what_changed_goes_back(storage: Path) -> None:
    before = {name: (storage / name).stat().st_mtime_ns for name in names(storage)}
    with local_run(f"file://{storage}") as (folder, origin):
        assert origin is not None
        assert {name: (folder / name).read_bytes() for name in names(folder)} == KEPT
        replaced = folder / "config.yaml.partial"
        replaced.write_bytes(b"model: smol")
        replaced.rename(folder / "config.yaml")
        (folder / "rivals").mkdir()
        (folder / "rivals" / "a.json").write_bytes(b"[1]")
        (folder / "half.partial").write_bytes(b"half")
        (folder / "status.json").write_bytes(b"the search writes its own")
    assert not folder.exists()
    assert names(storage) == {*KEPT, *ELSEWHERE, "rivals/a.json"}
    assert (storage / "config.yaml").read_bytes() == b"model: smol"
    assert (storage / "status.json").read_bytes() == b"large"
    changed = {name for name, time in before.items() if (storage / name).stat().st_mtime_ns != time}
    assert changed == {"config.yaml"}


@pytest.mark.parametrize("error", [LopError("it failed"), KeyboardInterrupt()])
def test_what_an_interrupted_stage_had_is_kept(storage: Path, error: BaseException) -> None:
    def interrupted() -> None:
        with local_run(f"file://{storage}") as (folder, _):
            (folder / "statistics.safetensors").write_bytes(b"hours of work")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert (storage / "statistics.safetensors").read_bytes() == b"hours of work"


def test_storage_that_nobody_knows_is_refused() -> None:
    with pytest.raises(LopError, match="nonsense"), local_run("nonsense://bucket/run"):
        pass
