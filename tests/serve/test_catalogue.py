"""The service's predictors are those of its catalogue and of the command line."""

import asyncio
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import ValidationError

from lop.model.find import assets
from lop.run.config import load_config, save_config
from lop.run.prediction import predictor_for
from serve.app import PredictorDeployment
from serve.catalogue import load_catalogue, open_run
from serve.schemas import AllocationRequest
from serve.settings import ServiceSettings


def test_the_service_allocates_as_the_command_line_does(tmp_path: Path) -> None:
    models = {}
    for name, ratio in (("plain", None), ("bounded", 1.05)):
        shutil.copytree(assets() / "run", tmp_path / name)
        own = load_config(tmp_path / name / "config.yaml", max_width_ratio=ratio)
        save_config(own, tmp_path / name / "config.yaml")
        models[name] = {"run": tmp_path / name}
    settings = ServiceSettings(storage=tmp_path / "kept", models=cast(Any, models))
    catalogue = load_catalogue(settings)
    deployed = cast(Any, PredictorDeployment).func_or_class(settings, catalogue)
    found = {}
    for name, entry in settings.models.items():
        run = open_run(entry)
        budget = run.space.budget(0.5)
        (found[name],) = asyncio.run(deployed.allocate([(name, budget)]))
        assert found[name] == predictor_for(run, run.config).allocate(budget).widths
        assert max(found[name]) <= catalogue[name].space.max_width(budget)
    assert found["plain"] != found["bounded"]
    # Two checkpoints, then, of one predictor: they must not go by one name.
    assert catalogue["plain"].fingerprints != catalogue["bounded"].fingerprints


def test_a_run_that_distils_is_offered_as_what_it_starts_from(tmp_path: Path) -> None:
    shutil.copytree(assets() / "run", tmp_path / "run")
    save_config(load_config(tmp_path / "run" / "config.yaml", recovery="distil"), tmp_path / "run" / "config.yaml")
    settings = ServiceSettings(storage=tmp_path / "kept", models=cast(Any, {"own": {"run": tmp_path / "run"}}))
    assert load_catalogue(settings)["own"].recovery == "refit"
    with pytest.raises(ValidationError, match="distil"):
        AllocationRequest.model_validate({"model": "own", "target": {"ratio": 0.5}, "recovery": "distil"})
