"""A run in a bucket, as a user meets it: pyarrow's S3 client, and a server that speaks S3."""

import json
from pathlib import Path

import pandas
import pytest

import lop
from lop.cli import main
from lop.models import assets
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
