"""The service's predictors are those of its catalogue and of the command line."""

import asyncio
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from pydantic import ValidationError

from lop.errors import LopError
from lop.model.find import assets
from lop.run.config import load_config, save_config
from lop.run.features import save_features
from lop.run.prediction import predictor_for, predictor_identity
from lop.space.features import PRUNED, SCALARS, Features
from serve.app import PredictorDeployment
from serve.catalogue import load_catalogue, open_run
from serve.schemas import AllocationRequest
from serve.settings import ModelSettings, ServiceSettings


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


def test_a_model_that_was_only_calibrated_is_offered(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "statistics.safetensors"):
        shutil.copy(assets() / "run" / name, run)
    settings = ServiceSettings(storage=tmp_path, models={"new": ModelSettings(run=run)})
    with pytest.raises(LopError, match="is missing: run `lop train` first, after a search, or `lop calibrate`"):
        load_catalogue(settings)
    opened = open_run(settings.models["new"])
    curve = np.tile(np.log(PRUNED), (opened.space.layers, 1))
    scalars = np.zeros((opened.space.layers, len(SCALARS)))
    save_features(opened, Features(np.stack([curve, curve, curve]), scalars))
    model = load_catalogue(settings)["new"]
    assert model.space == opened.space
    assert model.fingerprints["predictor"] == predictor_identity(opened)
    assert not model.curves  # Nothing has been measured of what comes out.
