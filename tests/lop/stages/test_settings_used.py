"""Settings reach every path that they are for, and what is there already was made with them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lop.model.elastic
from lop.errors import LopError
from lop.methods.lop_predictor import METHOD as LOP_PREDICTOR
from lop.model.find import assets
from lop.model.samples import SampleSets
from lop.model.statistics import NeuronStatistics
from lop.report.cells import Cell, CellWorker
from lop.report.compare import comparison_fingerprints
from lop.report.entries import given, lop_entries
from lop.run.building import Materials, build_scorer
from lop.run.config import Config, find_config, load_config
from lop.run.prediction import open_predictor, predictor_for
from lop.run.run import Run
from lop.search.racing import Candidate
from lop.space.allocation import Allocation
from lop.stages.local import Local
from lop.stages.rivals import Job, RivalWorker, _job_fingerprint
from lop.stages.train import train_stage


def config(*overrides: str, **values: Any) -> Config:
    return load_config(find_config("tiny"), overrides, **values)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    """The run that ships, in a folder of its own, with other settings."""
    shutil.copytree(assets() / "run", tmp_path / "run")
    return lambda *overrides: Run(load_config(tmp_path / "run" / "config.yaml", overrides), tmp_path / "run")


class TrainedError(Exception):
    """Predictors are being trained."""


@pytest.mark.parametrize(
    "setting",
    [
        *("seed=1", "granularity=32", "max_ratio=0.9", "max_width_ratio=1.5"),
        *("train.epochs=1", "train.architectures=[mlp]", "search.reward=margin", "search.tie_breaker=margin"),
    ],
)
def test_predictors_of_other_settings_are_trained_anew(setting: str, run: Callable[..., Run]) -> None:
    class Refusing(Local):
        def tune(self, *arguments: Any, **named: Any) -> list[Any]:
            raise TrainedError

    train_stage(run(), Refusing(), progress=False)  # As it is, it is there already.
    with pytest.raises(TrainedError):
        train_stage(run(setting), Refusing(), progress=False)


@pytest.mark.parametrize("setting", ["max_width_ratio=1.05", "granularity=32", "max_ratio=0.75"])
def test_every_way_to_ask_the_predictor_keeps_to_the_widths_allowed(setting: str, run: Callable[..., Run]) -> None:
    mine = run(setting)
    budget = mine.space.budget(0.5)
    plain = open_predictor(run(), mine.predictor_folder).allocate(budget)
    wanted = predictor_for(mine, mine.config).allocate(budget)
    assert wanted.budget == budget
    assert wanted != plain
    assert all(mine.space.min_width <= width <= mine.space.max_width(budget) for width in wanted.widths)
    assert all(width % mine.space.granularity == 0 for width in wanted.widths)
    assert predictor_for(None, mine.config).allocate(budget) == wanted  # What ships is the same predictor.
    assert LOP_PREDICTOR(given(mine, LOP_PREDICTOR), budget).allocation == wanted
    entries = {entry.method: entry.cell.widths for entry in lop_entries(mine, [0.5])}
    assert entries["lop-predictor"] == wanted.widths
    assert "general" not in entries  # It is where a search starts from, and no row.
    assert comparison_fingerprints(mine) != comparison_fingerprints(run())


def test_widths_that_the_model_cannot_have_are_refused(run: Callable[..., Run]) -> None:
    mine = run("granularity=7")
    with pytest.raises(LopError, match="granularity 7 does not divide"):
        predictor_for(mine, mine.config)


@pytest.mark.parametrize("compiles", [False, True])
def test_all_that_score_compile_where_they_are_told_to(
    compiles: bool, samples: SampleSets, tiny_statistics: NeuronStatistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    scoring = ""

    def fused() -> Callable[..., Any]:
        calls.append(scoring)
        return lop.model.elastic.gated

    monkeypatch.setattr("lop.model.elastic.fused_gated", fused)
    settings = config(f"compile={str(compiles).lower()}", "search.evaluations=1", "search.roots=[flap]")
    run = Run(settings, assets() / "run")
    few = samples.reward[:2]
    order = np.tile(np.arange(run.space.neurons), (run.space.layers, 1))
    materials = Materials(settings, order, tiny_statistics.mean, samples.calibration[:2])
    half = tuple([run.space.neurons // 2] * run.space.layers)
    scoring = "search"
    build_scorer(materials, few).evaluate(Candidate(Allocation(half)))
    scoring = "rivals"
    RivalWorker(materials, few, run.space)(Job("random", (0.5,), 0))
    scoring = "tables"
    CellWorker(materials, tiny_statistics, few)(Cell("activation", half))
    assert set(calls) == ({"search", "rivals", "tables"} if compiles else set())


def test_a_rival_of_samples_drawn_otherwise_is_run_anew(run: Callable[..., Run]) -> None:
    # The second seed of a run of seed 0, and the first of a run of seed 1.
    prints = {_job_fingerprint(run(f"seed={seed}"), Job("evolution", (0.5,), 1)) for seed in (0, 1)}
    assert len(prints) == 2
