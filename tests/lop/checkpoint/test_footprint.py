"""Targets are upper bounds, whatever the format and the recovery; and what is predicted is what the files hold."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lop.checkpoint.export import export
from lop.checkpoint.footprint import Footprint
from lop.checkpoint.formats import FORMATS, Format
from lop.checkpoint.recoveries import RECOVERIES, Recovery
from lop.cli import main
from lop.errors import LopError
from lop.model.tensors import down_projections, model_size
from lop.space.allocation import Allocation, Space, project
from lop.space.size import ModelSize, Target
from lop.storage.headers import read_header, read_tensors
from tests.lop.checkpoint.test_export import small_checkpoint

SPACE = Space(12, 320, 8, 0.95)
SIZE = ModelSize(12, 320, 3_107_648, 6_215_296, 288, 576)
# Those of other types than the model's own: tests/lop/checkpoint/edge.
OWN = [form for form, layout in FORMATS.items() if not layout.gguf]
FORMS = [(form, recovery) for form in OWN for recovery in RECOVERIES if (form, recovery) != ("padded", "bias")]
forms = st.sampled_from(FORMS)
units = st.sampled_from(["parameters", "bytes"])


def predictor(space: Space, seed: int) -> Callable[[int], Allocation]:
    """Some predictor: widths that differ wildly, from layer to layer and from budget to budget."""

    def predict(budget: int) -> Allocation:
        return project(np.random.default_rng((seed, budget)).normal(0.5, 2, space.layers), space, budget)

    return predict


@given(form=forms, seed=st.integers(0, 9), asked=st.integers(0, 8_000_000), unit=units)
def test_a_target_is_never_exceeded_or_the_range_is_named(
    form: tuple[Format, Recovery], seed: int, asked: int, unit: str
) -> None:
    footprint = Footprint(SIZE, *form)
    target = Target(**{unit: max(asked, 1)})  # type: ignore[arg-type]
    weigh = getattr(footprint, unit)
    least, most = weigh([SPACE.min_width] * 12), weigh([320] * 12)
    if not least <= asked <= most:
        with pytest.raises(LopError, match=f"target of {max(asked, 1)} {unit} is outside .*: {least} to {most}"):
            footprint.budgets(target, SPACE)
        return
    allocation = footprint.allocate(target, SPACE, predictor(SPACE, seed))
    assert weigh(allocation.widths) <= asked
    # One step more would be too much: of one layer, or of all where they must be alike.
    step = 12 * 8 if form[0] == "padded" else 8
    larger = allocation.budget + step
    if larger <= 12 * 320:
        assert weigh(project([SPACE.ratio(larger)] * 12, SPACE, larger).widths) > asked


@given(form=forms, ratio=st.floats(0, SPACE.max_target), seed=st.integers(0, 9))
def test_a_ratio_is_of_neurons_in_every_format(form: tuple[Format, Recovery], ratio: float, seed: int) -> None:
    predict = predictor(SPACE, seed)
    budget = SPACE.budget(ratio)
    assert Footprint(SIZE, *form).allocate(Target(ratio=ratio), SPACE, predict) == predict(budget)


@settings(max_examples=25)
@given(form=forms, seed=st.integers(0, 99), share=st.floats(0, 1), unit=units)
def test_what_is_predicted_is_what_the_files_hold(
    form: tuple[Format, Recovery], seed: int, share: float, unit: str
) -> None:
    kind, recovery = form
    with TemporaryDirectory() as parent:
        source, out, added = Path(parent) / "dense", Path(parent) / "pruned", Path(parent) / "added.safetensors"
        small_checkpoint(source, 3, 5, 12, torch.bfloat16, 1)
        dense = read_tensors(source)
        space, footprint = Space(3, 12, 2, 0.9), Footprint(model_size(dense), kind, recovery)
        least, most = (getattr(footprint, unit)([width] * 3) for width in (space.min_width, 12))
        asked = least + int(share * (most - least))
        target = Target(**{unit: asked})  # type: ignore[arg-type]
        allocation = footprint.allocate(target, space, predictor(space, seed))
        if recovery == "bias":
            names = [name.replace("weight", "bias") for name, _ in down_projections(dense)]
            save_file({name: torch.zeros(5, dtype=torch.bfloat16) for name in names}, added)
        order = np.tile(np.arange(12), (3, 1))
        recovered = read_header(added) if recovery == "bias" else {}
        export(source, out, allocation, order, about={}, format=kind, recovered=recovered)
        tensors = read_tensors(out).values()
        assert sum(info.parameters for info in tensors) == footprint.parameters(allocation.widths)
        assert sum(info.bytes for info in tensors) == footprint.bytes(allocation.widths)
        assert sum(getattr(info, unit) for info in tensors) <= asked


@pytest.mark.parametrize(("form", "recovery"), [("padded", "none"), ("hf", "bias")])
def test_the_command_line_keeps_what_was_asked(
    form: str, recovery: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = 4_321_000
    options = ["--bytes", str(asked), "--format", form, "--recovery", recovery]
    assert main(["predict", *options, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert main(["prune", *options, "--out", str(tmp_path / "out")]) == 0
    tensors = read_tensors(tmp_path / "out")
    assert sum(info.bytes for info in tensors.values()) == answer["bytes"] <= asked
    assert sum(info.parameters for info in tensors.values()) == answer["parameters"]
    widths = json.loads((tmp_path / "out" / "lop.json").read_text())["widths"]
    assert widths == answer["widths"]


def test_what_cannot_be_had_is_refused_with_what_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--format", "padded"], ["--recovery", "bias"]):
        assert main(["prune", "--bytes", "1KiB", *options, "--out", str(tmp_path / "out")]) == 2
        assert "outside what this model can have" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
