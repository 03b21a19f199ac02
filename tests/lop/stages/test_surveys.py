"""Surveys: made once in pieces, gone on with where they were stopped, and read by whoever needs them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lop.errors import LopError
from lop.methods.registry import METHODS
from lop.model.find import assets
from lop.report.compare import Comparison
from lop.report.needs import needs_in_words, without_checkpoint
from lop.run.config import load_config
from lop.run.run import Run
from lop.run.surveys import SURVEYS, Piece
from lop.space.allocation import Allocation
from lop.stages.calibrate import calibrate_stage
from lop.stages.compare import compare_stage
from lop.stages.local import Local
from lop.stages.prune import export_allocation
from lop.stages.surveys import Done, SurveyWorker, make_surveys, survey_stage
from lop.storage.files import read_as
from tests.lop.stages.samples_few import few_samples


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """One that has been calibrated, on a few samples."""
    config = load_config(assets() / "run" / "config.yaml", [f"samples={few_samples(tmp_path)}", "workers=0"])
    run = Run(config, tmp_path / "run")
    run.folder.mkdir()
    calibrate_stage(run, progress=False)
    return run


def found(run: Run, kind: str) -> dict[str, np.ndarray]:
    with safe_open(run.survey_file(kind), framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("kind", SURVEYS)
def test_an_interrupted_survey_goes_on_and_ends_alike(
    kind: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lop.run.surveys._GRADIENT_BYTES", 1 << 19)
    monkeypatch.setattr("lop.run.surveys._SAMPLES", 5)
    pieces = SURVEYS[kind].pieces(run.size, len(run.samples.calibration))
    assert len(pieces) > 2
    other = Run(run.config, tmp_path / "other")
    shutil.copytree(run.folder, other.folder)
    make_surveys(other, Local(), [kind], progress=False)
    made: list[Piece] = []
    work = SurveyWorker.__call__

    def until_stopped(self: SurveyWorker, piece: Piece) -> Done:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(piece)
        return work(self, piece)

    monkeypatch.setattr(SurveyWorker, "__call__", until_stopped)
    with pytest.raises(KeyboardInterrupt):
        make_surveys(run, Local(), [kind], progress=False)
    assert not run.survey_file(kind).exists()
    monkeypatch.setattr(SurveyWorker, "__call__", lambda self, piece: made.append(piece) or work(self, piece))
    make_surveys(run, Local(), [kind], progress=False)
    assert made == list(pieces)
    for name, array in found(other, kind).items():
        np.testing.assert_allclose(found(run, kind)[name], array, rtol=1e-6)
    assert run.survey_seconds(kind) > 0
    make_surveys(run, Local(), [kind], progress=False)
    assert made == list(pieces)
    assert not list((run.folder / "surveys").iterdir())


def test_only_what_methods_read_is_made(run: Run) -> None:
    survey_stage(run, Local(), ["flap", "uniform"], progress=False)
    assert not list(run.folder.glob("survey-*"))
    with pytest.raises(LopError, match=r"survey-removal\.safetensors is missing"):
        run.order_by("surgeon")
    survey_stage(run, Local(), ["minitron", "darwinlm"], progress=False)
    assert {file.name for file in run.folder.glob("survey-*")} == {
        "survey-removal.safetensors", "survey-sequences.safetensors"
    }  # fmt: skip
    run.survey_file("removal").write_bytes(b"nothing")
    with pytest.raises(LopError, match="is damaged"):
        run.order_by("surgeon")


def test_a_survey_of_other_samples_is_refused(run: Run) -> None:
    survey_stage(run, Local(), ["minitron"], progress=False)
    other = Run(run.config.model_copy(update={"samples": "tiny"}), run.folder)
    with pytest.raises(LopError, match="another calibration samples"):
        survey_stage(other, Local(), ["minitron"], progress=False)


def test_calibration_makes_what_the_configs_importance_reads(run: Run) -> None:
    surgeon = Run(run.config.model_copy(update={"importance": "surgeon"}), run.folder)
    calibrate_stage(surgeon, progress=False)
    np.testing.assert_array_equal(surgeon.order, found(run, "removal")["order"])


@pytest.mark.parametrize("recovery", ["none", "bias", "refit"])
def test_an_allocation_is_exported_in_a_methods_own_order(recovery: str, run: Run, tmp_path: Path) -> None:
    survey_stage(run, Local(), ["darwinlm"], progress=False)
    allocation = Allocation(tuple([80] * run.space.layers))
    out = tmp_path / "small"
    manifest = export_allocation(run, allocation, out, target=0.5, importance="surgeon", recovery=recovery)
    assert manifest["importance"] == "surgeon"
    written, dense = (load_file(next(folder.glob("*.safetensors"))) for folder in (out, run.model_folder))
    (name,) = [name for name in dense if name.endswith("layers.3.mlp.gate_proj.weight")]
    kept = run.order_by("surgeon")[3, :80]
    theirs = next(value for key, value in written.items() if key.endswith("layers.3.mlp.gate_proj.weight"))
    assert set(map(tuple, theirs.float().tolist())) == set(
        map(tuple, dense[name][torch.from_numpy(kept)].float().tolist())
    )


def test_methods_are_compared_by_name(tmp_path: Path) -> None:
    # The search and the predictor that ship, on a few samples.
    folder = tmp_path / "run"
    shutil.copytree(assets() / "run", folder)
    for name in ("statistics.safetensors", "results.json"):
        (folder / name).unlink()
    settings = (
        "compare.methods=[lop-search, flap, llm-pruner, tyr, puzzletron, shortgpt, fastv, yopo, dejavu]",
        "compare.shares=[0.5]",
        "compare.targets=[0.5]",
        "compare.recovery_targets=[0.5]",
        "compare.recoveries=[none, refit]",
        "search.evaluations=5",
        f"samples={few_samples(tmp_path)}",
        "workers=0",
    )
    run = Run(load_config(folder / "config.yaml", settings), folder)
    found = json.loads(run.search_file.read_text())
    run.search_file.write_text(json.dumps(found | {"fingerprints": run.evaluation_fingerprints}))
    calibrate_stage(run, progress=False)
    report = compare_stage(run, Local()).read_text()
    comparison = read_as(folder / "results.json", Comparison.from_dict)
    names = ["flap", "llm-pruner", "puzzletron", "tyr", "lop-search"]
    assert [spent.method for spent in comparison.seconds] == [*names, "shortgpt"]
    *averages, shortened = comparison.averages[1:]
    # The parameters of half of all neurons are those of 4.26 layers.
    assert (shortened.method, shortened.widths) == ("shortgpt", (160,) * 7)
    assert {(average.method, sum(average.widths)) for average in averages} == {
        (name, run.space.budget(0.5)) for name in names
    }
    assert {(each.method, each.recovery) for each in comparison.recoveries} == {
        (name, recovery) for name in (*names, "shortgpt") for recovery in ("none", "refit")
    }
    assert "| shortgpt | states |" in report
    assert "| llm-pruner | activations, gradients (" in report
    (images, neurons) = re.findall(r"\| method \| share .*\n\|.*\n((?:\|.*\n)+)", report)
    assert [line.split(" | ")[:3] for line in images.splitlines()] == [
        [f"| {name}", "50%", base] for name in ("fastv", "yopo") for base in ("0%", "50%")
    ]
    assert re.fullmatch(r"\| dejavu \| 50% \| .* \| states, training on them \| 50,112 \| [0-9.]+ \|\n", neurons)
    assert "| tyr | activations, inverse Gram matrices (0.00061 GB), evaluations |" in report


def test_what_needs_cost_in_words(run: Run) -> None:
    # All gradients of 12 layers of 160 neurons with 216 weights each, in float32.
    assert needs_in_words(METHODS["llm-pruner"].needs, run.size) == "activations, gradients (0.0017 GB)"
    assert needs_in_words(METHODS["magnitude"].needs, run.size) == "weights alone"
    assert needs_in_words(METHODS["evolution"].needs, run.size) == "activations, evaluations"


def test_why_there_is_no_checkpoint() -> None:
    assert without_checkpoint(["flap", "shortgpt", "llm-streamline"]) == []
    assert without_checkpoint(["slicegpt", "flap", "slicegpt"]) == [
        "No checkpoint can be written of `slicegpt` (no layer of the architecture multiplies the residual stream by a "
        "matrix)."
    ]
