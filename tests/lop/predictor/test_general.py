"""The predictor for models that it has never seen, on models that are made up, and on the one that ships."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lop.errors import LopError
from lop.predictor.curves import PLAIN, Curves, Rule, rising
from lop.predictor.direct import ratios
from lop.predictor.general import General, load_general
from lop.predictor.general_training import FITS, Measured, fit_general, leave_one_out
from lop.predictor.probing import Probe, corrected, next_probe
from lop.predictor.training import Pair
from lop.space.allocation import Allocation, Space, uniform
from lop.space.features import PRUNED, SCALARS, Features
from lop.storage.files import read_json

SHARES = np.array(PRUNED)


def made_up(seed: int, layers: int) -> Measured:
    """A model whose damages are what second order says, but for a factor that its scalars tell."""
    random = np.random.default_rng(seed)
    level = random.normal(-6, 1.5, (layers, 1))
    fisher = level + 2 * np.log(SHARES)
    refit, energy = (np.log(SHARES) * slope + np.zeros((layers, 1)) for slope in (1.5, 1.2))
    scalars = random.normal(size=(layers, len(SCALARS)))
    logs = fisher + 1 + scalars[:, 2:3] + random.normal(0, 0.1, fisher.shape)
    pairs = tuple(Pair(target, best(logs, target).ratios(space_of(layers))) for target in (0.3, 0.5))
    return Measured(f"made{seed}", Features(np.stack([energy, refit, fisher]), scalars), np.exp(logs), pairs)


def space_of(layers: int) -> Space:
    return Space(layers, 160, 8, 0.95)


def best(logs: np.ndarray, target: float) -> Allocation:
    """What a search would find, were these the damages and did they add up."""
    space = space_of(len(logs))
    return Curves(logs, np.ones_like(logs)).allocate(space, space.budget(target), PLAIN)


ZOO = [made_up(seed, layers) for seed, layers in enumerate((6, 8, 12, 10, 16, 9))]


def error(curves: Curves, member: Measured) -> float:
    return float(np.sqrt(np.nanmean((curves.mean - member.logs) ** 2)))


def distance(first: Allocation, second: Allocation) -> float:
    return float(np.abs(np.subtract(first.widths, second.widths)).mean())


@pytest.mark.parametrize("kind", ["ridge", "attention"])
def test_what_the_zoo_teaches_holds_for_a_model_left_out(kind: str) -> None:
    learned, plain = (leave_one_out(name, ZOO[:4]) for name in (kind, "second-order"))
    errors = [sum(error(found[m.name].curves(m.features), m) for m in ZOO[:4]) for found in (learned, plain)]
    assert errors[0] < 0.75 * errors[1]


def test_what_searches_found_is_written_for_a_model_left_out_at_targets_never_searched() -> None:
    learned = leave_one_out("direct", ZOO)
    written, even = [], []
    for member in ZOO:
        space = space_of(member.features.layers)
        budget, wanted = space.budget(0.4), best(np.log(member.damages), 0.4)
        written.append(distance(learned[member.name].answering(member.features)(space, budget), wanted))
        even.append(distance(uniform(space, budget), wanted))
    assert sum(written) < 0.6 * sum(even)


def test_a_ratio_depends_on_those_before_it() -> None:
    general, features = fit_general("direct", ZOO[:4]), ZOO[4].features
    changed = {**general.arrays, "enter.weight": general.arrays["enter.weight"].copy()}
    changed["enter.weight"][..., -1] += 1.0
    before, after = ratios(general.arrays, features, 0.4), ratios(changed, features, 0.4)
    assert before[0] == after[0]
    assert (before[1:] != after[1:]).all()


def test_once_probed_the_kind_that_writes_ratios_answers_by_curves() -> None:
    general, features = fit_general("direct", ZOO[:4]), ZOO[4].features
    space = space_of(features.layers)
    budget, probes = space.budget(0.4), [Probe(3, 0.5, 100.0)]
    wanted = corrected(general.curves(features), probes).allocate(space, budget, general.rule)
    assert general.answering(features, probes)(space, budget) == wanted
    assert general.answering(features)(space, budget) != wanted


def test_without_searches_there_is_nothing_to_write_by() -> None:
    with pytest.raises(LopError, match="2 models to learn from"):
        fit_general("direct", [*ZOO[:2], replace(ZOO[2], pairs=())])


def test_intervals_hold_about_what_they_say() -> None:
    left_out = leave_one_out("ridge", ZOO)
    inside = []
    for member in ZOO:
        low, high = left_out[member.name].curves(member.features).interval()
        inside.append(((low <= member.damages) & (member.damages <= high)).mean())
    assert 0.75 < np.mean(inside) <= 1


@pytest.mark.parametrize("kind", FITS)
def test_what_is_saved_answers_as_before(kind: str, tmp_path: Path) -> None:
    made = fit_general(kind, ZOO[:3], rule=Rule(0.8, 0.2))
    made.save(tmp_path / "general.safetensors")
    read = load_general(tmp_path / "general.safetensors")
    assert (read.rule, read.members) == (made.rule, made.members)
    mine, theirs = made.curves(ZOO[5].features), read.curves(ZOO[5].features)
    assert np.array_equal(mine.mean, theirs.mean)
    assert np.array_equal(mine.deviation, theirs.deviation)
    assert (np.diff(mine.mean, axis=1) >= 0).all()
    assert (mine.deviation > 0).all()
    space = space_of(ZOO[5].features.layers)
    answers = [found.answering(ZOO[5].features)(space, space.budget(0.45)) for found in (made, read)]
    assert answers[0] == answers[1]


def test_what_was_not_measured_teaches_nothing_and_breaks_nothing() -> None:
    holes = ZOO[0].damages.copy()
    holes[:, :7] = np.nan
    found = fit_general("ridge", [Measured("holes", ZOO[0].features, holes), *ZOO[1:4]])
    assert np.isfinite(found.curves(ZOO[5].features).deviation).all()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "general.safetensors").write_bytes(b"no tensors")
    with pytest.raises(LopError, match="is damaged"):
        load_general(tmp_path / "general.safetensors")


def test_two_models_are_too_few() -> None:
    with pytest.raises(LopError, match="2 models to learn from"):
        fit_general("ridge", ZOO[:2])


def test_curves_are_met_where_they_are_known_and_made_to_rise() -> None:
    mean = np.log(SHARES)[None] * np.array([[1.0], [2.0]])
    curves = Curves(mean, np.ones_like(mean))
    assert np.allclose(curves.at(SHARES), mean)
    assert np.allclose(curves.at(np.array([0.03])), [[np.log(0.03)], [2 * np.log(0.03)]])
    assert rising(np.array([[0.0, 2.0, 1.0, 3.0]])).tolist() == [[0.0, 1.5, 1.5, 3.0]]


def test_what_layers_cost_together_is_the_sum_of_what_each_costs() -> None:
    # Damages that go by the square of the share: known at every share, between those of the grid and below them.
    factors = np.array([0.1, 1.0, 5.0])
    curves = Curves(np.log(factors)[:, None] + 2 * np.log(PRUNED), np.ones((3, 9)))
    ratios = np.array([[0.5, 0.25, 0.001], [0.0, 0.9, 0.0], [0.3, 0.0, 0.6]])
    np.testing.assert_allclose(np.exp(curves.together(ratios)), ratios**2 @ factors, rtol=1e-6)
    assert np.isneginf(curves.together(np.zeros((1, 3)))).all()


def test_probes_pull_their_layer_and_its_neighbours_and_are_made_once() -> None:
    curves = Curves(np.log(SHARES)[None] * np.ones((8, 1)), np.ones((8, 9)))
    half = PRUNED.index(0.5)
    found = corrected(curves, [Probe(3, 0.5, np.exp(1.0))])
    moved = found.mean[:, half] - curves.mean[:, half]
    assert moved[3] == pytest.approx(1 + np.log(2), abs=0.02)
    assert moved[3] > moved[2] > moved[0] > 0.2  # What all layers have in common.
    assert found.deviation[3, half] < 0.1 < found.deviation[0, half]
    made: list[Probe] = []
    while (place := next_probe(curves, made)) is not None:
        made.append(Probe(*place, 1.0))
    assert len({(probe.layer, probe.share) for probe in made}) == len(made) == 8 * 3


@pytest.mark.parametrize("general", [load_general(), fit_general("direct", ZOO[:3])], ids=["ships", "direct"])
def test_an_allocation_of_28_layers_takes_two_milliseconds(general: General) -> None:
    space = Space(28, 18944, 128, 0.95)
    features = made_up(0, 28).features
    times = []
    for target in np.linspace(0.1, 0.6, 9):
        budget, start = space.budget(float(target)), time.perf_counter()
        found = general.answering(features)(space, budget)
        times.append(time.perf_counter() - start)
        assert found.budget == budget
    assert min(times) < 0.002


def test_what_ships_learned_from_the_data_that_is_kept() -> None:
    kept = [read_json(path) for path in (Path(__file__).parents[3] / "training" / "zoo" / "data").glob("*.json")]
    measured = {record["name"] for record in kept if record["damages"][0][-1] is not None}
    assert set(load_general().members) == measured
