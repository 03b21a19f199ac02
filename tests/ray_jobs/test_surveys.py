"""Surveys on actors find what they find in one process."""

import shutil
from pathlib import Path

import pytest

from lop.model.find import assets
from lop.model.statistics import load_survey
from lop.run.config import load_config
from lop.run.run import Run
from lop.run.surveys import SURVEYS
from lop.stages.calibrate import calibrate_stage
from lop.stages.local import Local
from lop.stages.surveys import make_surveys
from ray_jobs.compute import OnRay
from tests.lop.stages.samples_few import few_samples

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_pieces_made_by_actors_are_those_of_one_process(tmp_path: Path) -> None:
    settings = (f"samples={few_samples(tmp_path)}", "workers=2")
    run = Run(load_config(assets() / "run" / "config.yaml", settings), tmp_path / "run")
    run.folder.mkdir()
    calibrate_stage(run, progress=False)
    other = Run(run.config, tmp_path / "other")
    shutil.copytree(run.folder, other.folder)
    make_surveys(run, Local(), SURVEYS, progress=False)
    make_surveys(other, OnRay(), SURVEYS, progress=False)
    for kind in SURVEYS:
        mine, theirs = (load_survey(each.survey_file(kind), run.calibration_fingerprints)[0] for each in (run, other))
        assert mine.keys() == theirs.keys()
        assert all((mine[name] == theirs[name]).all() for name in mine)
