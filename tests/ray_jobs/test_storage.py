"""A run in a bucket, as a user meets it: pyarrow's S3 client, and a server that speaks S3."""

import json
from pathlib import Path

import pandas
import pytest

import lop
from lop.checkpoint.export import verify
from lop.cli import main
from lop.model.find import assets
from lop.run.config import find_config, load_config
from lop.run.run import Run
from lop.search.evaluation import Evaluation
from lop.search.ledger import Ledger
from lop.space.allocation import Allocation
from lop.stages.demo import _prune_all
from lop.storage.files import write_json
from lop.storage.location import Location
from lop.storage.mirror import local_run

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


def test_the_demo_leaves_its_checkpoints_in_the_bucket(
    bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = bucket.format("demo")
    location = Location.parse(place)
    for file in (path for path in (assets() / "run").rglob("*") if path.is_file()):
        location.write(file.relative_to(assets() / "run").as_posix(), file.read_bytes())
    config = load_config(find_config("tiny"), ["compare.targets=[0.5]", "recovery=none"])

    def prune() -> None:
        with local_run(place) as (folder, origin):
            _prune_all(Run(config, folder, origin))

    prune()
    checkpoint = location / "checkpoints" / "0.500"
    assert verify(checkpoint)["target"] == 0.5
    (tmp_path / "pruned").mkdir()
    for name in checkpoint.files():
        (tmp_path / "pruned" / name).write_bytes(checkpoint.read(name))
    verify(tmp_path / "pruned")
    with caplog.at_level("INFO"):
        prune()
    assert f"prune: {checkpoint} is there already" in caplog.text
    weights = checkpoint.read("model.safetensors")
    checkpoint.write("model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    prune()
    assert checkpoint.read("model.safetensors") == weights


def test_a_search_repeated_with_another_seed_is_in_the_bucket_while_it_runs(bucket: str) -> None:
    place = bucket.format("seeds")
    location = Location.parse(place)
    with local_run(place) as (folder, origin):
        other = Run(load_config(find_config("tiny")), folder, origin).with_seed(1)
        assert other.config.seed == 1
        with Ledger(other.ledger, {}) as ledger:
            ledger.append(Allocation((8, 16)), Evaluation(0.5, -1.0))
            ledger.flush()
            assert len(lop.evaluations(location / "seeds" / "1")) == 1
        assert (other.location / "tune").uri.startswith("s3://bucket/seeds/seeds/1/tune?")
        write_json(other.search_file, {})
        assert {path.name for path in other.folder.iterdir()} == {"search.json"}
    assert location.has("seeds/1/search.json")
    with local_run(place) as (folder, _):
        assert (folder / "seeds" / "1" / "search.json").exists()
        assert not list(folder.rglob("ledger"))  # Not to be copied with every stage.


def test_what_hours_have_made_is_in_the_bucket_before_the_stage_ends(bucket: str) -> None:
    place = bucket.format("kept")
    with local_run(place) as (folder, origin):
        run = Run(load_config(find_config("tiny")), folder, origin)
        write_json(folder / "rivals" / "a.json", [1])
        run.keep(folder / "rivals" / "a.json")
        assert Location.parse(place).files() == ["rivals/a.json"]


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
