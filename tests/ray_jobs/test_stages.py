"""A search on Ray actors gives what one process gives, bit for bit."""

import json
from pathlib import Path

import pytest

from lop.config import Config, find_config, load_config
from lop.ledger import read_ledger
from lop.run import Run
from lop.stages import calibrate_stage, search_stage

pytestmark = pytest.mark.usefixtures("ray_cluster")
SETTINGS = ["search.targets={first: 0.3, last: 0.5, step: 0.1}", "search.evaluations=4", "search.simulations=6"]


def searched(folder: Path, workers: int) -> tuple[dict[str, object], object]:
    config: Config = load_config(find_config("tiny"), SETTINGS, workers=workers)
    run = Run(config, folder)
    calibrate_stage(run, progress=False)
    search_stage(run, progress=False)
    return json.loads(run.search_file.read_text()), sorted(read_ledger(run.ledger))


def test_a_search_on_actors_is_the_search_of_one_process(tmp_path: Path) -> None:
    assert searched(tmp_path / "fleet", workers=2) == searched(tmp_path / "alone", workers=0)
