"""The predictor for models that it has never seen, on models that are made up, and on the one that ships."""

import time
from pathlib import Path

import numpy as np
import pytest

from lop.errors import LopError
from lop.predictor.curves import Curves, Rule, rising
from lop.predictor.general import load_general
from lop.predictor.general_training import FITS, Measured, fit_general, leave_one_out
from lop.predictor.probing import Probe, corrected, next_probe
from lop.space.allocation import Space
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
    damages = np.exp(fisher + 1 + scalars[:, 2:3] + random.normal(0, 0.1, fisher.shape))
    return Measured(f"made{seed}", Features(np.stack([energy, refit, fisher]), scalars), damages)


ZOO = [made_up(seed, layers) for seed, layers in enumerate((6, 8, 12, 10, 16, 9))]


def error(curves: Curves, member: Measured) -> float:
    return float(np.sqrt(np.nanmean((curves.mean - member.logs) ** 2)))


@pytest.mark.parametrize("kind", ["ridge", "attention"])
def test_what_the_zoo_teaches_holds_for_a_model_left_out(kind: str) -> None:
    learned, plain = (leave_one_out(name, ZOO[:4]) for name in (kind, "second-order"))
    assert sum(error(learned[m.name], m) for m in ZOO[:4]) < 0.75 * sum(error(plain[m.name], m) for m in ZOO[:4])


def test_intervals_hold_about_what_they_say() -> None:
    left_out = leave_one_out("ridge", ZOO)
    inside = []
    for member in ZOO:
        low, high = left_out[member.name].interval()
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


def test_an_allocation_of_28_layers_takes_two_milliseconds() -> None:
    general, space = load_general(), Space(28, 18944, 128, 0.95)
    features = made_up(0, 28).features
    times = []
    for target in np.linspace(0.1, 0.6, 9):
        budget, start = space.budget(float(target)), time.perf_counter()
        found = general.curves(features).allocate(space, budget, general.rule)
        times.append(time.perf_counter() - start)
        assert found.budget == budget
    assert min(times) < 0.002


def test_what_ships_learned_from_the_data_that_is_kept() -> None:
    kept = [read_json(path) for path in (Path(__file__).parents[3] / "training" / "zoo" / "data").glob("*.json")]
    measured = {record["name"] for record in kept if record["damages"][0][-1] is not None}
    assert set(load_general().members) == measured
