"""Settings as every replica reads them, whatever its working directory."""

from pathlib import Path

import pytest

from lop.errors import LopError
from serve.settings import ModelSettings, ServiceSettings


def test_paths_are_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").touch()
    models = {"mine": ModelSettings(run=Path("run"), config="config.yaml"), "tiny": ModelSettings(config="tiny")}
    found = ServiceSettings(storage=Path("kept"), models=models).resolved()
    assert found.storage == tmp_path / "kept"
    assert found.models["mine"] == ModelSettings(run=tmp_path / "run", config=str(tmp_path / "config.yaml"))
    assert found.models["tiny"] == models["tiny"]


def test_storage_that_is_gone_with_a_deployment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked = tmp_path / "working_dir_files"
    unpacked.mkdir()
    monkeypatch.chdir(unpacked)
    with pytest.raises(LopError, match="storage runs/service is relative"):
        ServiceSettings().resolved()
    assert ServiceSettings(storage=tmp_path).resolved().storage == tmp_path
