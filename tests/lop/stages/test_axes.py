"""A run with attention open, from calibration to the checkpoint; and what it starts from, and refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from lop.checkpoint.inspection import inspect
from lop.errors import LopError
from lop.model.statistics import load_statistics
from lop.report.compare import compare
from lop.run.choice import choose
from lop.run.config import Config, find_config, load_config
from lop.run.prediction import predictor_for
from lop.run.results import read_search
from lop.run.run import Run
from lop.search.watch import print_ledger
from lop.space.allocation import Allocation, dense
from lop.space.size import Target
from lop.stages.calibrate import calibrate_stage, features_stage
from lop.stages.compare import compare_stage
from lop.stages.distil import distil_stage
from lop.stages.local import Local
from lop.stages.probe import probe_stage
from lop.stages.prune import export_allocation, prune_stage
from lop.stages.rivals import rivals_stage
from lop.stages.search import search_stage, started
from lop.stages.surveys import survey_stage
from lop.stages.train import train_stage
from tests.groups import GROUPS, grouped_tiny
from tests.lop.distil.conftest import QUICK
from tests.lop.stages.samples_few import few_samples

LAYERS, NEURONS = 12, 160
FEW = (
    "search.targets={first: 0.2, last: 0.4, step: 0.1}", "search.simulations=8", "search.evaluations=6",
    "search.roots=[flap, sensitivity]", "search.sensitivity_levels=1", "search.method=guided",
    "search.recovery=refit", "search.reward=divergence", "search.confirm={}", "train.epochs=2",
    "train.architectures=[mlp]", "compare.targets=[0.3]", "compare.recoveries=[]", "compare.limit=8",
)  # fmt: skip
BOTH = ("parts=[ffn, attention]", "min_width=0")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("axes")
    grouped_tiny(folder)
    few_samples(folder)
    return folder


def config(base: Path, *settings: str) -> Config:
    places = {"model": str(base / "grouped"), "samples": str(base / "samples")}
    return load_config(find_config("tiny"), [*FEW, *settings], **places)


@pytest.fixture(scope="module")
def ffns(base: Path) -> Run:
    """A search of FFNs alone, whose answers are a little smaller than the other's targets."""
    run = Run(config(base, "search.targets={first: 0.4, last: 0.7, step: 0.15}"), base / "ffns")
    calibrate_stage(run, progress=False)
    search_stage(run, Local(), progress=False)
    return run


@pytest.fixture(scope="module")
def both(base: Path, ffns: Run) -> Run:
    run = Run(config(base, *BOTH, f"search.start={ffns.folder}"), base / "both")
    run.folder.mkdir()
    # Statistics of before attention was open, which are made anew.
    run.statistics_file.write_bytes(ffns.statistics_file.read_bytes())
    calibrate_stage(run, progress=False)
    search_stage(run, Local(), progress=False)
    train_stage(run, Local(), progress=False)
    return run


def test_statistics_of_ffns_alone_are_made_anew_and_else_the_same(ffns: Run, both: Run) -> None:
    (old, _), (new, _) = (load_statistics(run.statistics_file) for run in (ffns, both))
    assert old.groups is None
    assert new.groups is not None
    np.testing.assert_array_equal(old.mean, new.mean)


def test_every_allocation_is_within_the_budget_and_spends_it(both: Run) -> None:
    space = both.space
    for found in read_search(both):
        budget = space.budget(found.target)
        for allocation, _ in found.evaluations:
            left = budget - space.cost(allocation.widths)
            assert 0 <= left < space.parts[0].cost * space.granularity


def test_the_search_starts_from_the_other_runs_answer_and_is_not_behind_it(ffns: Run, both: Run) -> None:
    starts = started(both)
    answers = {found.best.widths for found in read_search(ffns)}
    for found in read_search(both):
        start = starts[found.target]
        assert found.evaluations[0][0] == start
        assert start.widths[LAYERS:] == (GROUPS,) * LAYERS
        # What the budget has left is spent near by.
        assert any(np.abs(np.subtract(start.widths[:LAYERS], widths)).max() <= 40 for widths in answers)
        confirmed = dict(found.confirmed)
        assert confirmed[found.best].worth("divergence") >= confirmed[start].worth("divergence")


def test_a_ledger_of_both_parts_can_be_shown(both: Run, capsys: pytest.CaptureFixture[str]) -> None:
    print_ledger(both.location)
    first = capsys.readouterr().out.splitlines()[1]
    assert len(first.split()[4]) == 2 * LAYERS


def test_a_target_becomes_a_checkpoint_of_as_many_parameters(both: Run, tmp_path: Path) -> None:
    target = Target(parameters=2_000_000)
    choice = choose(both, both.config, target)
    assert len(choice.allocation.widths) == 2 * LAYERS
    prune_stage(both, both.config, target, tmp_path / "hf")
    found = inspect(tmp_path / "hf")
    assert found.parameters == choice.footprint.parameters(choice.allocation.widths) <= 2_000_000
    assert found.widths == choice.allocation.widths[:LAYERS]
    assert (found.groups or (GROUPS,) * LAYERS) == choice.allocation.widths[LAYERS:]


@pytest.mark.parametrize("form", ["hf", "padded"])
def test_what_is_left_of_both_parts_learns_from_the_dense_model(form: str, both: Run, tmp_path: Path) -> None:
    widths = (80,) * LAYERS + (0, 2, 3) * (LAYERS // 3)
    start = tmp_path / "start"
    export_allocation(both, Allocation(widths), start, target=0.5, format=form, recovery="none")
    settings = load_config(both.folder / "config.yaml", QUICK)
    manifest = distil_stage(settings, start, tmp_path / "out", work=tmp_path / "work")
    found = inspect(tmp_path / "out")
    assert (found.widths + (found.groups or ()), found.damage) == (widths, "")
    learnt = manifest["distilled"][-1]["reward_kl"]
    assert learnt["end"] < 0.6 * learnt["start"]


def test_fewer_bits_take_as_many_bytes_as_was_said(both: Run, tmp_path: Path) -> None:
    target = Target(ratio=0.3)
    choice = choose(both, both.config, target, bits=4)
    prune_stage(both, both.config, target, tmp_path / "hf", bits=4)
    found = inspect(tmp_path / "hf")
    assert (found.bits, found.bytes) == (4, choice.footprint.bytes(choice.allocation.widths))
    assert found.widths == choice.allocation.widths[:LAYERS]
    assert found.manifest["quantised"]["rounding"] == "compensated"


def test_the_report_compares_methods_that_know_ffns_alone(both: Run) -> None:
    compare_stage(both, Local())
    rows = json.loads((both.folder / "results.json").read_text())["averages"]
    widths = {row["method"]: row["widths"] for row in rows}
    assert widths["flap"][LAYERS:] == [GROUPS] * LAYERS
    assert widths["dense"] == list(dense(both.space).widths)
    assert "groups of attention heads" in both.report_file.read_text()
    assert (both.folder / "allocations.png").stat().st_size > 0


def test_methods_that_prune_heads_are_compared(base: Path, both: Run) -> None:
    names = ["flap", "flap-heads", "llm-pruner-heads", "llm-pruner-heads-vector"]
    start = f"search.start={both.config.search.start}"
    run = Run(config(base, *BOTH, start, f"compare.methods=[{', '.join(names)}]"), both.folder)
    survey_stage(run, Local(), names, progress=False)
    found = {average.method: average.widths for average in compare(run, progress=False).averages}
    budget = run.space.budget(0.3)
    for name in names:
        assert run.space.cost(found[name]) <= budget
    assert found["flap-heads"][LAYERS:] != found["flap"][LAYERS:] == (GROUPS,) * LAYERS
    assert found["llm-pruner-heads"][LAYERS:] != (GROUPS,) * LAYERS
    own, theirs = run.groups_by(run.config.importance), run.groups_by("flap-heads")
    assert not np.array_equal(own, theirs)


def test_the_predictor_for_all_models_keeps_attention_dense(base: Path, both: Run) -> None:
    run = Run(config(base, *BOTH), base / "unsearched")
    run.folder.mkdir()
    run.statistics_file.write_bytes(both.statistics_file.read_bytes())
    features_stage(run)
    budget = run.space.budget(0.2)
    found = predictor_for(run, run.config).allocate(budget)
    assert found.widths[LAYERS:] == (GROUPS,) * LAYERS
    assert 0 <= budget - run.space.cost(found.widths) < run.space.parts[0].cost * run.space.granularity


def test_probes_measure_ffns_and_their_small_search_moves_attention_too(base: Path, both: Run) -> None:
    run = Run(config(base, *BOTH), base / "probed")
    run.folder.mkdir()
    run.statistics_file.write_bytes(both.statistics_file.read_bytes())
    alone = probe_stage(run, Local(), 2, progress=False).probes
    found = probe_stage(run, Local(), 6, 0.3, progress=False)
    budget = run.space.budget(0.3)
    assert found.probes == alone
    assert len(alone) == 2
    best = found.best[budget]
    assert len(best.widths) == 2 * LAYERS
    assert 0 <= budget - run.space.cost(best.widths) < run.space.parts[0].cost * run.space.granularity
    assert predictor_for(run, run.config).allocate(budget) == best


def test_a_ratio_is_of_the_parameters_of_what_is_open(ffns: Run, both: Run) -> None:
    size = both.size
    assert ffns.removed_parameters(0.4) == size.parameters - size.pruned_parameters(ffns.space.budget(0.4))
    assert both.removed_parameters(0.4) == pytest.approx(0.4 * both.space.whole, abs=1)


def test_what_knows_ffns_alone_is_refused(base: Path, both: Run, ffns: Run) -> None:
    with pytest.raises(LopError, match="evolution knows FFNs alone"):
        rivals_stage(both, Local(), rivals=["random", "evolution"], progress=False)
    with pytest.raises(LopError, match="parts open that are not among ffn"):
        started(Run(config(base, f"search.start={both.folder}"), base / "other"))
    small = config(base, *BOTH, f"search.start={ffns.folder}", "search.targets={first: 0.6, last: 0.6, step: 0.1}")
    with pytest.raises(LopError, match=r"no answer as small as target 0\.6"):
        started(Run(small, base / "other"))
    with pytest.raises(LopError, match="predicts ffn and attention, and the config has parts ffn"):
        predictor_for(Run(config(base), both.folder), both.config)
    with pytest.raises(LopError, match="parts: it must name 'ffn'"):
        config(base, "parts=[attention]")
