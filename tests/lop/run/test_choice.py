"""A size in bytes chooses the ratio and the bits: by what was measured, and by nothing else."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lop.cli import main
from lop.errors import LopError
from lop.model.find import assets
from lop.predictor.predictor import load_predictor
from lop.run.choice import choose, footprint_of
from lop.run.config import load_config
from lop.run.qualities import Qualities, Quality, quality_fingerprints, read_qualities
from lop.run.run import Run
from lop.space.allocation import dense
from lop.space.size import Target
from lop.storage.files import write_json

MADE_UP = {16: (0.0, 0.2, 0.9, 3.0), 8: (0.01, 0.21, 0.91, 3.1), 4: (0.4, 0.5, 1.2, 3.5)}
RATIOS = (0.0, 0.2, 0.4, 0.9)


def with_qualities(folder: Path) -> Run:
    """What ships for the embedded model, with qualities that somebody made up."""
    if not folder.exists():
        shutil.copytree(assets() / "run", folder)
    run = Run(load_config(folder / "config.yaml"), folder)
    measured = [
        Quality(ratio, bits, 0, divergence)
        for bits, divergences in MADE_UP.items()
        for ratio, divergence in zip(RATIOS, divergences)
    ]
    qualities = Qualities("refit", 9, tuple(measured))
    write_json(run.qualities_file, {"fingerprints": quality_fingerprints(run), "qualities": qualities.as_dict()})
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return with_qualities(tmp_path_factory.mktemp("choice") / "run")


@settings(max_examples=12)
@given(share=st.floats(0, 1))
def test_the_best_that_fits_is_chosen(run: Run, share: float) -> None:
    largest = footprint_of(run, "hf", "refit", 16).bytes(dense(run.space).widths)
    smallest = footprint_of(run, "hf", "refit", 4).bytes([run.space.min_width] * run.space.layers)
    asked = smallest + int(share * (largest - smallest))
    try:
        choice = choose(run, run.config, Target(bytes=asked))
    except LopError:
        pytest.fail("something fits")
    found = choice.describe()
    assert found["bytes"] <= asked
    chosen = next(option for option in choice.options if option.bits == found["bits"])
    known = [option.divergence for option in choice.options if option.divergence is not None]
    assert not known or chosen.divergence == min(known)
    assert {option.bits for option in choice.options} == {16, 8, 4}
    for option in choice.options:
        assert option.bytes is None or option.bytes <= asked
    # Pinned, it is as without measurements.
    if chosen.ratio:
        assert choose(run, run.config, Target(bytes=asked), bits=found["bits"]).describe() == found


def test_between_ratios_quality_never_gets_better_by_pruning(run: Run) -> None:
    qualities = read_qualities(run)
    assert qualities is not None
    assert qualities.bits == (16, 8, 4)
    bumpy = replace(qualities, measured=(Quality(0.0, 8, 0, 0.3), Quality(0.5, 8, 0, 0.1), Quality(0.7, 8, 0, 0.5)))
    assert bumpy.at(8, 0.25) == bumpy.at(8, 0.5) == pytest.approx(0.3)
    assert bumpy.at(8, 0.6) == pytest.approx(0.4)
    assert bumpy.at(8, 0.71) is None
    assert bumpy.at(4, 0.1) is None


def test_formats_with_types_of_their_own_have_no_bits_to_choose(run: Run) -> None:
    choice = choose(run, run.config, Target(bytes=1_500_000), "gguf-true")
    assert (choice.bits, choice.options) == (16, ())
    assert choice.describe()["bytes"] <= 1_500_000


def test_the_command_line_says_what_the_others_would_give(
    run: Run, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lop.commands")

    def bits(*options: str) -> int:
        caplog.clear()
        assert main(["predict", "--bytes", "4.0MB", "--json", *options]) == 0
        return int(json.loads(capsys.readouterr().out)["bits"])

    assert bits("--run", str(run.folder)) == 8
    assert [line.split(" bits")[0] for line in caplog.messages] == ["16", "8", "4"]
    assert ["(chosen)" in line for line in caplog.messages] == [False, True, False]
    assert bits("--run", str(run.folder), "--bits", "16") == 16
    assert caplog.messages == []
    assert bits() == 16
    assert "`lop measure`" in caplog.text


def test_what_was_measured_with_another_predictor_is_refused(run: Run, tmp_path: Path) -> None:
    other = with_qualities(tmp_path / "run")
    data = json.loads(other.qualities_file.read_text())
    data["fingerprints"]["predictor"] = "another"
    write_json(other.qualities_file, data)
    with pytest.raises(LopError, match="made with another predictor"):
        choose(other, other.config, Target(bytes=4_000_000))


def test_widths_without_the_recovery_that_they_were_searched_with_are_warned_of(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = with_qualities(tmp_path / "run")
    predictor = load_predictor(other.predictor_folder)
    replace(predictor, fingerprints={**predictor.fingerprints, "recovery": "refit"}).save(other.predictor_folder)
    for owner, recovery, is_warned in ((other, "none", True), (other, "refit", False), (run, "none", False)):
        caplog.clear()
        config = load_config(owner.folder / "config.yaml", recovery=recovery)
        choose(owner, config, Target(ratio=0.3))
        assert ("the search scored widths with recovery refit: with none" in caplog.text) == is_warned
