import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lop.errors import LopError
from lop.predictor.inference import NETWORKS, predict
from lop.predictor.networks import ARCHITECTURES, build, weights_of
from lop.predictor.predictor import Predictor, load_predictor
from lop.space.allocation import Space, project, uniform
from lop.space.size import ModelSize

SPACE = Space(layers=7, neurons=96, granularity=8, max_ratio=0.9)
SIZE = ModelSize(layers=7, neurons=96, parameters=200_000, bytes=400_000, neuron_parameters=90, neuron_bytes=180)
NAMES = sorted(ARCHITECTURES)


def network(architecture: str, layers: int = SPACE.layers) -> torch.nn.Module:
    """One that answers far from uniform, as its last layer is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        built = build(architecture, layers)
        torch.nn.init.normal_(built.out.weight, std=0.3)  # type: ignore[arg-type, union-attr]
    return built.eval()


def predictor(architecture: str) -> Predictor:
    return Predictor(architecture, weights_of(network(architecture)), SPACE, SIZE, {"model": "0123456789abcdef"})


PREDICTORS = {name: predictor(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(target=st.floats(0, SPACE.max_target))
def test_every_target_is_met_exactly(name: str, target: float) -> None:
    found = PREDICTORS[name].allocate(SPACE.budget(target))
    assert found.budget == SPACE.budget(target)
    assert all(SPACE.min_width <= width <= SPACE.neurons and width % 8 == 0 for width in found.widths)


@pytest.mark.parametrize("name", NAMES)
def test_ratios_are_shares_and_the_allocation_is_the_one_nearest_to_them(name: str) -> None:
    ratios = PREDICTORS[name].ratios(0.5)
    assert ratios.shape == (SPACE.layers,)
    assert ratios.dtype == np.float64
    assert ((ratios > 0) & (ratios < 1)).all()
    assert np.ptp(ratios) > 1e-3
    budget = SPACE.budget(0.5)
    assert PREDICTORS[name].allocate(budget) == project(PREDICTORS[name].ratios(SPACE.ratio(budget)), SPACE, budget)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0.02, SPACE.max_target), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_where_the_search_was_it_answers_what_the_search_found(targets: list[float], seed: int) -> None:
    generator, bare = np.random.default_rng(seed), PREDICTORS["mlp"]
    budgets = {SPACE.budget(target) for target in targets}
    known = tuple(project(generator.uniform(0, 0.9, SPACE.layers), SPACE, budget) for budget in budgets)
    knowing = replace(bare, known=known)
    assert {knowing.allocate(allocation.budget) for allocation in known} == set(known)
    by_target = sorted(known, key=lambda allocation: -allocation.budget)
    beside = [np.array(a.ratios(SPACE)) - bare.ratios(SPACE.ratio(a.budget)) for a in by_target]
    for left, right, low, high in zip(by_target, by_target[1:], beside, beside[1:]):
        between = (SPACE.ratio(left.budget) + SPACE.ratio(right.budget)) / 2
        np.testing.assert_allclose(knowing.ratios(between), bare.ratios(between) + (low + high) / 2, atol=1e-9)
    np.testing.assert_allclose(knowing.ratios(0.999) - bare.ratios(0.999), beside[-1], atol=1e-9)


def test_what_it_knows_is_saved(tmp_path: Path) -> None:
    known = (project(np.linspace(0, 0.8, SPACE.layers), SPACE, SPACE.budget(0.4)),)
    replace(PREDICTORS["mlp"], known=known).save(tmp_path / "p")
    found = load_predictor(tmp_path / "p")
    assert found.known == known
    assert found.allocate(SPACE.budget(0.4)) == known[0] != PREDICTORS["mlp"].allocate(SPACE.budget(0.4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [0.05, 0.3, 0.7])
def test_an_untrained_network_answers_the_uniform_allocation(name: str, target: float) -> None:
    untrained = Predictor(name, weights_of(build(name, SPACE.layers)), SPACE, SIZE, {})
    np.testing.assert_allclose(untrained.ratios(target), target, atol=1e-6)
    assert untrained.allocate(SPACE.budget(target)) == uniform(SPACE, SPACE.budget(target))


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(
    layers=st.sampled_from([1, 2, 7, 28, 80]),
    target=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.1, 2),
)
def test_answers_without_torch_are_those_of_the_trained_network(
    name: str, layers: int, target: float, seed: int, scale: float
) -> None:
    # Each answer is what the network says when it is fed the answers before it.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        built = build(name, layers).double()
        for parameter in built.parameters():
            parameter.normal_(std=scale / parameter.shape[-1] ** 0.5)
        free = predict(name, weights_of(built.float()), layers, target)
        forced = built.double()(torch.tensor([target]).double(), torch.from_numpy(free)[None].double())[0]
    assert free.dtype == np.float32
    np.testing.assert_allclose(free, forced.numpy(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layers", [5, 9])
@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_weights_for_another_number_of_layers_are_refused(name: str, layers: int) -> None:
    with pytest.raises(LopError, match=f"for {layers} layers, not 7"):
        predict(name, weights_of(network(name, layers)), SPACE.layers, 0.5)


def test_every_network_can_be_trained_and_can_answer() -> None:
    assert NETWORKS.keys() == ARCHITECTURES.keys()


def test_a_step_of_the_transformer_sees_the_layers_before_it_and_no_others() -> None:
    built = network("transformer")
    targets, ratios = torch.tensor([0.4]), torch.full((1, SPACE.layers), 0.4)
    changed = ratios.clone()
    changed[0, 3] = 0.9
    with torch.inference_mode():
        before, after = built(targets, ratios)[0], built(targets, changed)[0]
    torch.testing.assert_close(before[:4], after[:4], atol=0, rtol=0)
    assert ((before[4:] - after[4:]).abs() > 1e-5).all()


def test_no_architecture_has_another_name() -> None:
    with pytest.raises(LopError, match=r"architecture 'gru' is not one of mlp, lstm, transformer"):
        build("gru", 4)
    with pytest.raises(LopError, match=r"architecture 'gru' is not one of mlp, lstm, transformer"):
        predict("gru", {}, 4, 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_weight_is_named(name: str) -> None:
    weights = PREDICTORS[name].weights
    for missing in weights:
        with pytest.raises(LopError, match=missing):
            predict(name, {key: value for key, value in weights.items() if key != missing}, SPACE.layers, 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_predictor_answers_the_same(name: str, tmp_path: Path) -> None:
    PREDICTORS[name].save(tmp_path / "p")
    loaded = load_predictor(tmp_path / "p")
    assert (loaded.architecture, loaded.space, loaded.size) == (name, SPACE, SIZE)
    assert loaded.fingerprints == {"model": "0123456789abcdef"}
    for target in (0.0, 0.123, 0.9):
        np.testing.assert_array_equal(loaded.ratios(target), PREDICTORS[name].ratios(target))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["p", "predictor.json", "weights.safetensors"]


def test_saving_takes_an_older_predictor_s_place(tmp_path: Path) -> None:
    PREDICTORS["mlp"].save(tmp_path / "p")
    PREDICTORS["lstm"].save(tmp_path / "p")
    assert load_predictor(tmp_path / "p").architecture == "lstm"
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("name", ["predictor.json", "weights.safetensors"])
def test_a_flipped_byte_is_found(name: str, tmp_path: Path) -> None:
    PREDICTORS["mlp"].save(tmp_path / "p")
    path = tmp_path / "p" / name
    whole = path.read_bytes()
    places = [place for place in range(len(whole)) if not whole[place : place + 1].isspace()]
    for place in random.Random(5).sample(places, 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(LopError) as raised:
            load_predictor(tmp_path / "p")
        assert "\n" not in str(raised.value)
    path.write_bytes(whole)
    load_predictor(tmp_path / "p")


@pytest.mark.parametrize("name", ["predictor.json", "weights.safetensors"])
def test_a_torn_or_missing_file_is_one_line(name: str, tmp_path: Path) -> None:
    PREDICTORS["lstm"].save(tmp_path / "p")
    path = tmp_path / "p" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(LopError, match="is damaged"):
        load_predictor(tmp_path / "p")
    path.unlink()
    with pytest.raises(LopError, match=name):
        load_predictor(tmp_path / "p")


def test_a_missing_folder_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(LopError, match="run `lop train` first"):
        load_predictor(tmp_path / "p")


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"fingerprint": 1}'])
def test_another_json_file_is_no_predictor(content: str, tmp_path: Path) -> None:
    (tmp_path / "predictor.json").write_text(content)
    with pytest.raises(LopError, match="is damaged"):
        load_predictor(tmp_path)


def test_weights_of_another_network_are_refused_when_loaded(tmp_path: Path) -> None:
    Predictor("mlp", weights_of(network("mlp", layers=9)), SPACE, SIZE, {}).save(tmp_path / "p")
    with pytest.raises(LopError, match="for 9 layers, not 7") as raised:
        load_predictor(tmp_path / "p")
    assert "\n" not in str(raised.value)


def test_what_a_predictor_was_made_from_can_be_read(tmp_path: Path) -> None:
    PREDICTORS["transformer"].save(tmp_path / "p")
    about = json.loads((tmp_path / "p" / "predictor.json").read_text())
    assert about["architecture"] == "transformer"
    assert about["network"] == {"dimension": 128, "heads": 4, "encoder_layers": 2}
    assert about["space"]["layers"] == 7
    assert about["fingerprints"] == {"model": "0123456789abcdef"}
