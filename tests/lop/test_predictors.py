from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lop.allocation import Space, uniform
from lop.errors import LopError
from lop.predictors import ARCHITECTURES, Predictor, build, load_predictor
from lop.size import ModelSize
from lop.training import Fit, Pair, fit, split_pairs, validation_error

SPACE = Space(12, 320, 8, 0.95)
SIZE = ModelSize(12, 320, 2_000_000, 4_000_000, 288, 576)
EVERY = pytest.mark.parametrize("architecture", list(ARCHITECTURES))


def law(target: float) -> tuple[float, ...]:
    """Later layers lose more, the more so the larger the target."""
    slope = np.linspace(-1, 1, SPACE.layers) * 0.6 * target * (1 - target)
    return tuple(float(target + value) for value in slope)


PAIRS = [Pair(target, law(target)) for target in np.round(np.arange(0.05, 0.71, 0.05), 3).tolist() for _ in range(3)]


def fitted(architecture: str, *, epochs: int = 3) -> Fit:
    training, validation = split_pairs(PAIRS, 0.2)
    return fit(architecture, training, validation, epochs=epochs, batch=40, learning_rate=3e-3, seed=5)


def predictor(architecture: str, *, epochs: int = 3) -> Predictor:
    return Predictor(architecture, fitted(architecture, epochs=epochs).weights, SPACE, SIZE, {"model": "abc"})


@EVERY
def test_untrained_networks_answer_the_target(architecture: str) -> None:
    network = build(architecture, 12)
    predicted = network.predict(torch.tensor([0.35]))  # type: ignore[operator]
    torch.testing.assert_close(predicted, torch.full((1, 12), 0.35))


@pytest.fixture(scope="module")
def trained() -> dict[str, Predictor]:
    return {name: predictor(name) for name in ARCHITECTURES}


@given(st.sampled_from(list(ARCHITECTURES)), st.floats(0, SPACE.max_target))
@settings(max_examples=60, deadline=None)
def test_every_prediction_meets_the_budget(trained: dict[str, Predictor], architecture: str, target: float) -> None:
    allocation = trained[architecture].allocate(SPACE.budget(target))
    assert allocation.budget == SPACE.budget(target)
    assert all(SPACE.min_width <= width <= SPACE.neurons for width in allocation.widths)


@torch.no_grad()
def test_the_loop_agrees_with_teacher_forcing_on_its_own_words(trained: dict[str, Predictor]) -> None:
    network = build("transformer", 12)
    network.load_state_dict(dict(trained["transformer"].weights))
    for target in (0.1, 0.5, 0.7):
        looped = network.predict(torch.tensor([target]))  # type: ignore[operator]
        torch.testing.assert_close(network(torch.tensor([target]), looped), looped, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_layer_sees_only_the_layers_before_it() -> None:
    network = build("transformer", 12)
    torch.nn.init.normal_(network.out.weight)  # type: ignore[union-attr, arg-type]
    given_ratios = torch.rand(1, 12)
    changed = given_ratios.clone()
    changed[0, 6] += 0.3
    before, after = (network(torch.tensor([0.4]), ratios) for ratios in (given_ratios, changed))
    torch.testing.assert_close(before[0, :7], after[0, :7])
    assert (before[0, 7:] != after[0, 7:]).all()


@EVERY
def test_training_learns_a_simple_law(architecture: str) -> None:
    training, validation = split_pairs(PAIRS, 0.2)
    untrained = validation_error(build(architecture, 12), validation)
    found = fit(architecture, training, validation, epochs=60, batch=40, learning_rate=3e-3, seed=0)
    assert found.validation_error < untrained / 4


@EVERY
def test_training_is_a_function_of_its_arguments(architecture: str) -> None:
    first = fitted(architecture)
    torch.rand(3)
    second = fitted(architecture)
    assert first.validation_errors == second.validation_errors
    for name, tensor in first.weights.items():
        torch.testing.assert_close(tensor, second.weights[name], atol=0, rtol=0)


@given(st.integers(3, 40), st.floats(0.05, 0.9))
def test_validation_targets_are_inner_ones_and_not_trained_on(count: int, share: float) -> None:
    pairs = [Pair(n / 50, (0.1,)) for n in range(1, count + 1) for _ in range(2)]
    training, validation = split_pairs(pairs, share)
    assert len(training) + len(validation) == len(pairs)
    seen, held = {pair.target for pair in training}, {pair.target for pair in validation}
    assert held
    assert not seen & held
    assert {pairs[0].target, pairs[-1].target} <= seen


@EVERY
def test_a_predictor_survives_its_folder(architecture: str, tmp_path: Path, trained: dict[str, Predictor]) -> None:
    trained[architecture].save(tmp_path / "p")
    loaded = load_predictor(tmp_path / "p")
    np.testing.assert_array_equal(loaded.ratios(0.37), trained[architecture].ratios(0.37))
    assert (loaded.space, loaded.size, loaded.fingerprints) == (SPACE, SIZE, {"model": "abc"})


def test_damage_is_named(tmp_path: Path, trained: dict[str, Predictor]) -> None:
    with pytest.raises(LopError, match="lop train"):
        load_predictor(tmp_path / "none")
    trained["mlp"].save(tmp_path / "p")
    weights = tmp_path / "p" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(LopError, match="SHA-256"):
        load_predictor(tmp_path / "p")
    (tmp_path / "p" / "predictor.json").write_text("{}")
    with pytest.raises(LopError, match="damaged"):
        load_predictor(tmp_path / "p")


def test_unknown_architectures_are_named() -> None:
    with pytest.raises(LopError, match="mlp, lstm, transformer"):
        build("gru", 3)


def test_uniform_is_what_a_constant_law_predicts() -> None:
    untrained = Predictor("mlp", dict(build("mlp", 12).state_dict()), SPACE, SIZE, {})
    assert untrained.allocate(SPACE.budget(0.4)) == uniform(SPACE, SPACE.budget(0.4))
