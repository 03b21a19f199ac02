"""The zoo that the general predictor learns from: who is in it, and what is kept of them."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("easy_vqa")

from lop.predictor.general import load_general
from lop.predictor.general_training import Measured
from lop.run.config import find_config, load_config
from lop.space.allocation import Allocation, uniform
from lop.space.features import PRUNED, SCALARS
from lop.stages.local import Local
from training.zoo.data import load_members, load_searches, save_searches
from training.zoo.fit import Recipe, Tried, kendall, main, scored
from training.zoo.measure import TARGETS
from training.zoo.members import MEMBERS, Member
from training.zoo.scores import Scores


@pytest.mark.parametrize("member", MEMBERS.values(), ids=lambda member: member.name)
def test_every_member_is_a_model_that_tinys_scripts_can_train(member: Member) -> None:
    shape = member.shape
    assert shape.hidden == 24 * shape.heads  # The sections of M-RoPE come to half of that.
    assert shape.heads >= 2 * shape.key_heads  # Two heads of a group start out looking for their own kind.
    assert shape.neurons % 16 == 0
    assert sum(member.shares.values()) == pytest.approx(1)


def test_members_differ_in_depth_width_heads_and_seed() -> None:
    for what in (
        [member.shape.layers for member in MEMBERS.values()],
        [member.seed for member in MEMBERS.values()],
    ):
        assert len(set(what)) == len(MEMBERS) >= 8
    assert len({(member.shape.hidden, member.shape.heads, member.shape.key_heads) for member in MEMBERS.values()}) >= 4


def test_what_is_kept_of_them_is_whole_and_they_had_learned_something() -> None:
    for member in (member for member in load_members() if member.is_measured):
        layers = member.features.layers
        assert member.features.curves.shape == (3, layers, len(PRUNED))
        assert member.features.scalars.shape == (layers, len(SCALARS))
        assert member.damages.shape == (layers, len(PRUNED))
        assert np.isfinite(member.features.curves).all()
        # Pruned by half alone, a layer costs something, and by most of it more.
        assert (member.damages[:, PRUNED.index(0.5)] > 0).all()
        assert (member.damages[:, -1] > member.damages[:, PRUNED.index(0.25)]).mean() > 0.9


def test_tau_counts_the_pairs_that_are_ordered_alike() -> None:
    first = np.array([1.0, 2.0, 3.0])
    assert kendall(first, first) == 1
    assert kendall(first, -first) == -1
    assert kendall(first, np.array([1.0, 3.0, 2.0])) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "member", [member for member in load_members() if member.pairs], ids=lambda member: member.name
)
def test_what_is_kept_of_searches_meets_their_targets(member: Measured) -> None:
    for target, best in load_searches(member.name).items():
        assert len(set(best)) == len(best) >= 1
        assert all(len(allocation.widths) == member.features.layers for allocation in best)
        assert len({allocation.budget for allocation in best}) == 1
        (ratio,) = {round(pair.target, 9) for pair in member.pairs if abs(pair.target - target) < 0.02}
        assert target <= ratio + 1e-9  # Budgets are rounded down.


def test_searches_for_other_targets_are_kept_beside_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.zoo.data._SEARCHES", tmp_path / "searches")
    save_searches("new", {0.5: [Allocation((8, 8))], 0.3: [Allocation((12, 10)), Allocation((11, 11))]})
    save_searches("new", {0.2: [Allocation((14, 12))]})
    assert list(load_searches("new")) == [0.2, 0.3, 0.5]
    assert load_searches("new")[0.3] == [Allocation((12, 10)), Allocation((11, 11))]
    assert load_searches("nobody") == {}


def test_the_score_of_a_kind_is_the_mean_ratio_to_uniform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.zoo.scores.RESULTS", tmp_path)
    scores = Scores("tiny", None)
    even = [uniform(scores.space, scores.space.budget(target)) for target in TARGETS]
    better = [Allocation((one.widths[0] - 8, one.widths[1] + 8, *one.widths[2:])) for one in even[:-1]] + even[-1:]
    for one in even:
        scores.keep("reward", one, 0.8)
    for one in better[:-1]:
        scores.keep("reward", one, 0.1)
    tried = [Tried(Recipe("ridge", None), {}, {"tiny": found}) for found in (even, better)]
    config = load_config(find_config("tiny"), workers=0)
    assert [found["tiny"] for found in scored(tried, Local(), tmp_path, config)] == pytest.approx([1.0, 8**-0.75])


def test_what_costs_least_on_models_left_out_is_written_from_scores_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predictor.safetensors"
    monkeypatch.setattr(sys, "argv", ["fit", "--workers", "0", "--work", str(tmp_path), "--out", str(out)])
    monkeypatch.setattr("training.zoo.fit.STRENGTHS", {"second-order": (None,), "ridge": (None,)})
    main()
    first, second, written = capsys.readouterr().out.splitlines()
    assert first.startswith("ridge ")
    assert second.startswith("second-order ")
    assert written == f"{out}: ridge"
    made, ships = load_general(out), load_general()
    assert (made.kind, made.members, made.rule) == (ships.kind, ships.members, ships.rule)
    for name, array in ships.arrays.items():
        np.testing.assert_allclose(made.arrays[name], array, rtol=1e-6, atol=1e-9)
