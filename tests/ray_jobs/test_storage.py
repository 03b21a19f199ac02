"""A run in a bucket, as a user meets it: pyarrow's S3 client, and a server that speaks S3."""

import json
import shutil
from pathlib import Path

import pandas
import pytest

import lop
from lop.checkpoint import verify
from lop.cli import main
from lop.config import find_config, load_config
from lop.files import write_json
from lop.mirror import local_run
from lop.models import assets
from lop.run import Run
from lop.stages import search_stage
from lop.storage import Location

FEW = [
    *("--set", "search.targets={first: 0.4, last: 0.5, step: 0.1}"),
    *("--set", "search.evaluations=2", "--set", "search.simulations=2", "--workers", "0"),
    *("--set", "search.roots=[flap]"),
]


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_a_search_in_a_bucket_is_that_of_a_folder_and_is_not_done_twice(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bucket.format("run")
    location = Location.parse(run)
    statistics = (assets() / "run" / "statistics.safetensors").read_bytes()
    location.write("statistics.safetensors", statistics)
    Location.parse(tmp_path).write("statistics.safetensors", statistics)
    for place in (run, str(tmp_path)):
        assert main(["search", "--config", "tiny", "--run", place, *FEW]) == 0
    assert json.loads(location.read("search.json")) == json.loads((tmp_path / "search.json").read_text())
    assert lop.evaluations(run) == lop.evaluations(tmp_path)
    assert pandas.DataFrame(lop.evaluations(run)).groupby("kept").size().tolist() == [2, 2]
    capsys.readouterr()
    assert lines(capsys, "ledger", run) == lines(capsys, "ledger", str(tmp_path))
    assert "4 of 4 evaluations, finished" in "".join(lines(capsys, "watch", run))
    before = location.files()
    assert main(["search", "--config", "tiny", "--run", run, *FEW]) == 0
    assert location.files() == before


def test_the_demo_in_a_bucket_leaves_its_checkpoints_there(
    bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    location = Location.parse(bucket.format("demo"))
    for file in (path for path in (assets() / "run").rglob("*") if path.is_file()):
        location.write(file.relative_to(assets() / "run").as_posix(), file.read_bytes())
    command = ["demo", "--config", "tiny", "--run", bucket.format("demo"), "--workers", "0"]
    command += ["--set", "compare.targets=[0.5]", "--set", "compare.recoveries=[]", "--set", "recovery=none"]
    assert main(command) == 0
    checkpoint = location / "checkpoints" / "0.500"
    assert verify(checkpoint)["target"] == 0.5
    download(checkpoint, tmp_path / "pruned")
    lop.load(tmp_path / "pruned")
    assert location.has("report.md")
    with caplog.at_level("INFO"):
        assert main(command) == 0
    assert f"prune: {checkpoint} is there already" in caplog.text
    weights = checkpoint.read("model.safetensors")
    checkpoint.write("model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    assert main(command) == 0
    assert checkpoint.read("model.safetensors") == weights


def test_a_search_repeated_with_another_seed_is_in_the_bucket_while_it_runs(bucket: str) -> None:
    place = bucket.format("seeds")
    location = Location.parse(place)
    location.write("statistics.safetensors", (assets() / "run" / "statistics.safetensors").read_bytes())
    few = [part for part in FEW if "=" in part]
    with local_run(place) as (folder, origin):
        other = Run(load_config(find_config("tiny"), few), folder, origin).with_seed(1)
        shutil.copytree(folder, other.folder)
        search_stage(other, progress=False)
        assert {"seeds/1/status.json"} < {name for name in location.files() if name.startswith("seeds/1/")}
        assert len(lop.evaluations(location / "seeds" / "1")) == 4
        assert (other.location / "tune").uri.startswith("s3://bucket/seeds/seeds/1/tune?")
        assert {path.name for path in other.folder.iterdir()} == {
            "statistics.safetensors", "config.yaml", "seconds.json", "search.json"
        }  # fmt: skip
        before = location.files()
    assert set(location.files()) - set(before) == {
        "seeds/1/statistics.safetensors", "seeds/1/config.yaml", "seeds/1/seconds.json", "seeds/1/search.json"
    }  # fmt: skip
    with local_run(place) as (folder, _):
        assert not list(folder.rglob("ledger"))  # Not to be copied with every stage.


def test_what_hours_have_made_is_in_the_bucket_before_the_stage_ends(bucket: str) -> None:
    place = bucket.format("kept")
    with local_run(place) as (folder, origin):
        run = Run(load_config(find_config("tiny")), folder, origin)
        write_json(folder / "rivals" / "a.json", [1])
        run.keep(folder / "rivals" / "a.json")
        assert Location.parse(place).files() == ["rivals/a.json"]


def download(place: Location, folder: Path) -> None:
    folder.mkdir()
    for name in place.files():
        (folder / name).write_bytes(place.read(name))


def test_storage_that_cannot_be_had_is_told_in_a_line(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = bucket.format("run").replace("//bucket/", "//missing/")
    for place, reason in (
        (nowhere, "there is no bucket 'missing'"),
        ("s3://", "names no folder"),
        ("ftp://host/run", "ftp"),
    ):
        assert main(["search", "--config", "tiny", "--run", place, *FEW]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lop: ")]
        assert reason in line
