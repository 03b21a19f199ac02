"""The spectra that AlphaPruning reads: measured when it is asked for, once for a run, and at nobody else's cost."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lop.errors import LopError
from lop.methods.method import Side
from lop.methods.registry import METHODS
from lop.model.adapter import QwenVL
from lop.model.encoding import encode
from lop.model.find import assets
from lop.model.samples import SampleSets
from lop.model.statistics import calibrate
from lop.report.cells import Cell, Scored
from lop.report.entries import Entry, given
from lop.report.speed import speeds
from lop.run.config import Config, find_config, load_config
from lop.run.run import Run
from lop.run.spectra import layer_spectra, tail_exponent
from lop.stages.search import build_trees


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """One that has been calibrated."""
    shutil.copy(assets() / "run" / "statistics.safetensors", tmp_path)
    return Run(load_config(find_config("tiny")), tmp_path)


def asking_for(run: Run, root: str) -> Run:
    search = run.config.search.model_dump() | {"roots": (root,), "targets": {"first": 0.5, "last": 0.5, "step": 0.1}}
    return Run(Config.model_validate(run.config.model_dump() | {"search": search}), run.folder)


def test_exponents_are_those_of_each_layers_three_matrices(run: Run) -> None:
    found = layer_spectra(run, progress=False).exponents
    assert found.shape == (run.space.layers,)
    with safe_open(run.model_folder / "model.safetensors", framework="pt") as file:
        for layer in (0, run.space.layers - 1):
            parts = [name for name in file.keys() if "visual" not in name]  # noqa: SIM118
            names = [name for name in parts if f"layers.{layer}.mlp." in name]
            assert len(names) == 3
            expected = np.mean([tail_exponent(file.get_tensor(name)) for name in names])
            assert found[layer] == pytest.approx(expected, rel=1e-6)


def test_they_are_measured_for_alphapruning_alone_and_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Tensor] = []

    def counted(weight: torch.Tensor) -> float:
        calls.append(weight)
        return tail_exponent(weight)

    monkeypatch.setattr("lop.run.spectra.tail_exponent", counted)
    for name in ("flap", "owl"):
        build_trees(asking_for(run, name))
    assert not calls
    assert not run.spectra_file.exists()
    build_trees(asking_for(run, "alphapruning"))
    assert len(calls) == 3 * run.space.layers
    again = Run(run.config, run.folder)
    first, second = layer_spectra(again), layer_spectra(again)
    assert len(calls) == 3 * run.space.layers
    assert first.seconds == second.seconds > 0
    method = METHODS["alphapruning"]
    choice = method(given(again, method), run.space.budget(0.5))
    assert len(set(choice.allocation.widths)) > 1
    assert len(calls) == 3 * run.space.layers


def test_calibration_measures_no_spectra(
    shared_tiny: QwenVL, samples: SampleSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("torch.linalg.eigvalsh", refuse)
    calibrate(shared_tiny, encode(shared_tiny, samples.calibration[:4], batch_tokens=700))


def test_spectra_of_another_model_are_measured_again(run: Run) -> None:
    first = layer_spectra(run, progress=False)
    record = json.loads(run.spectra_file.read_text())
    run.spectra_file.write_text(json.dumps(record | {"model": "another", "exponents": [9.0] * run.space.layers}))
    np.testing.assert_array_equal(layer_spectra(run, progress=False).exponents, first.exponents)


@pytest.mark.parametrize("content", ["[]", "{}", "nothing"])
def test_a_damaged_file_is_one_line(run: Run, content: str) -> None:
    run.spectra_file.write_text(content)
    with pytest.raises(LopError, match=r"spectra\.json is damaged"):
        layer_spectra(run, progress=False)


def test_the_seconds_are_alphaprunings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    spectra = replace(layer_spectra(run, progress=False), seconds=1000.0)
    monkeypatch.setattr("lop.run.surveys.layer_spectra", lambda run: spectra)
    cell = Cell("activation", (8,) * run.space.layers)
    entries = [
        Entry(name, Side.BASELINE, 0.5, 0, cell, METHODS[name].needs, 0.1)
        for name in ("magnitude", "flap", "alphapruning")
    ]
    scored = {cell: Scored(np.ones(1, bool), 0.1, 0.1)}
    spent = {found.method: found.seconds.calibrate for found in speeds(run, entries, scored)}
    assert spent == {"magnitude": 0.0, "flap": 0.0, "alphapruning": 1000.0}
