"""What a user names by a path means the same wherever it is read next, and what is written lasts."""

import os
import shutil
from pathlib import Path

import pytest

from lop.cli import build_parser, main
from lop.errors import LopError
from lop.model.find import assets, find_model, find_samples
from lop.options import settle
from lop.run.config import find_config, load_config, save_config
from lop.run.run import Run
from lop.stages.calibrate import calibrate_stage

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for a submitted job's driver.


@pytest.fixture(params=["variable", "folder"])
def job(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process as a Ray job, or one of its workers, has it; and the working directory."""
    folder = tmp_path / ("working_dir_files" if request.param == "folder" else "job")
    folder.mkdir()
    monkeypatch.chdir(folder)
    if request.param == "variable":
        monkeypatch.setenv(JOB, "{}")
    return folder


@pytest.mark.parametrize("place", [("--run", "runs/mine"), ()])
@pytest.mark.parametrize("command", ["calibrate", "search", "train", "rivals", "compare", "demo"])
def test_a_job_is_refused_what_would_be_gone_with_it(
    job: Path, command: str, place: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    workers = () if command == "calibrate" else ("--workers", "0")
    assert main([command, "--model", "tiny", *workers, *place]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lop: ")
    assert "gone with the job: name an absolute path" in line
    assert list(job.iterdir()) == []


def test_a_job_is_refused_checkpoints_that_would_be_gone_with_it(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--target", "0.3", "--out", "pruned"]) == 2
    assert "lop: --out pruned is relative" in capsys.readouterr().err
    assert list(job.iterdir()) == []


def test_a_job_writes_where_it_lasts(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(assets() / "run" / "statistics.safetensors", run)
    assert main(["calibrate", "--config", "tiny", "--run", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "statistics.safetensors")


def test_a_command_for_another_working_directory_names_its_run_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, place in ((["--run", "mine"], "mine"), ([], "runs/tiny")):
        config, elsewhere = settle(build_parser().parse_args(["calibrate", "--config", "tiny", *given]))
        assert config.model == "tiny"
        monkeypatch.chdir(tmp_path.parent)
        assert settle(elsewhere)[1].run == str(tmp_path / place)
        monkeypatch.chdir(tmp_path)


def test_a_run_of_relative_folders_goes_on_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(assets() / "model", "models/mine")
    os.symlink(assets() / "samples", "my-samples")
    config = load_config(find_config("tiny"), ["samples=my-samples"], model="models/mine")
    save_config(config, Path("run/config.yaml"))
    monkeypatch.chdir(tmp_path.parent)
    found = load_config(tmp_path / "run" / "config.yaml")
    assert (find_model(found.model), find_samples(found.samples)) == (tmp_path / "models/mine", tmp_path / "my-samples")
    shutil.copy(assets() / "run" / "statistics.safetensors", tmp_path / "run")
    calibrate_stage(Run(found, tmp_path / "run"))  # It is there already, and of this model and these samples.


def test_what_a_job_brings_along_is_found_by_its_workers(job: Path) -> None:
    shutil.copytree(assets() / "model", "models/mine")
    config = load_config(find_config("tiny"), model="models/mine")
    assert not Path(config.model).is_absolute()
    assert find_model(config.model).is_dir()
    shutil.rmtree("models")
    with pytest.raises(LopError, match="folder"):  # Not asked of the hub.
        find_model(config.model)


@pytest.mark.parametrize(
    "name", ["./mine", "../a/mine", "/nowhere/mine", "~/nowhere", "a/b/c", "models/mine", "mine/", "models/", "mine"]
)
def test_a_missing_folder_is_never_asked_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    asked = list[str]()
    monkeypatch.setattr("lop.model.find._download", asked.append)
    with pytest.raises(LopError):
        find_model(name)
    assert asked == []
    find_model("Qwen/Qwen2.5-VL-7B-Instruct")
    assert asked == ["Qwen/Qwen2.5-VL-7B-Instruct"]
