from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lop.errors import LopError
from lop.predictor.networks import ARCHITECTURES
from lop.predictor.predictor import Predictor
from lop.predictor.training import Fit, Pair, fit, split_pairs
from lop.space.allocation import Space
from lop.space.size import ModelSize

LAYERS = 8
SPACE = Space(LAYERS, 256, 8, 0.95)
SIZE = ModelSize(LAYERS, 256, 10**6, 2 * 10**6, 96, 192)
NAMES = sorted(ARCHITECTURES)


def law(target: float) -> np.ndarray:
    """[L] ratios around the target: later layers lose more, the more so the larger the target."""
    return np.asarray(target + 0.5 * target * np.linspace(-1, 1, LAYERS))


def noisy(targets: Iterable[float], *, each: int, noise: float) -> list[Pair]:
    random = np.random.default_rng(3)
    return [
        Pair(target, tuple(np.clip(law(target) + noise * random.standard_normal(LAYERS), 0, 0.95).tolist()))
        for target in targets
        for _ in range(each)
    ]


PAIRS = noisy([round(0.05 * n, 2) for n in range(1, 13)], each=3, noise=0.03)


def train(pairs: list[Pair] = PAIRS, **changes: Any) -> Fit:
    training, validation = split_pairs(pairs, 0.2)
    arguments = {"architecture": "mlp", "epochs": 5, "batch": 40, "learning_rate": 1e-3, "seed": 1} | changes
    return fit(training=training, validation=validation, **arguments)  # type: ignore[arg-type]


def error(found: Fit, targets: Iterable[float]) -> float:
    """Mean squared difference from the law, noise left out."""
    predictor = Predictor(found.architecture, found.weights, SPACE, SIZE, {})
    return float(np.mean([(predictor.ratios(target) - law(target)) ** 2 for target in targets]))


def assert_same(one: Fit, other: Fit) -> None:
    assert one.training_errors == other.training_errors
    assert one.validation_errors == other.validation_errors
    for name, array in one.weights.items():
        np.testing.assert_array_equal(array, other.weights[name])


@settings(deadline=None)
@given(
    targets=st.lists(st.integers(1, 90), min_size=3, max_size=30, unique=True),
    each=st.integers(1, 4),
    share=st.floats(0.01, 0.99),
)
def test_whole_inner_targets_are_held_out(targets: list[int], each: int, share: float) -> None:
    pairs = [Pair(target / 100, (target / 100, k / 10)) for target in targets for k in range(each)]
    training, validation = split_pairs(pairs, share)
    trained, held = {pair.target for pair in training}, {pair.target for pair in validation}
    assert not trained & held
    assert sorted([*training, *validation], key=pairs.index) == pairs
    assert {min(targets) / 100, max(targets) / 100} <= trained
    assert len(held) == min(max(1, round(share * len(targets))), len(targets) - 2)
    assert split_pairs(pairs[::-1], share)[1] == validation[::-1]


def test_held_out_targets_are_spread() -> None:
    _, validation = split_pairs([Pair(n / 100, (0.0,)) for n in range(1, 28)], 0.2)
    held = [round(pair.target * 100) for pair in validation]
    assert len(held) == 5
    assert min(np.diff(held)) >= 4


def test_two_targets_are_too_few() -> None:
    with pytest.raises(LopError, match="2 targets are too few: training needs three"):
        split_pairs([Pair(0.1, (0.1,)), Pair(0.2, (0.2,))], 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_training_is_a_function_of_its_arguments(name: str) -> None:
    first = train(architecture=name)
    torch.manual_seed(99)
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    try:
        second = train(architecture=name)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(first, second)
    assert train(architecture=name, seed=2).validation_errors != first.validation_errors


@pytest.mark.parametrize("name", NAMES)
def test_validation_pairs_do_not_change_what_is_learned(name: str) -> None:
    training, validation = split_pairs(PAIRS, 0.2)
    others = [replace(pair, ratios=(0.9,) * LAYERS) for pair in validation]
    options: dict[str, Any] = {"epochs": 4, "batch": 8, "learning_rate": 1e-3, "seed": 0}
    errors = [fit(name, training, held, **options).training_errors for held in (validation, others)]
    assert errors[0] == errors[1]


def test_the_best_epoch_is_kept() -> None:
    found = train(epochs=30, learning_rate=0.1)
    assert found.validation_error == min(found.validation_errors)
    assert len(found.training_errors) == len(found.validation_errors) == 30
    stopped = train(epochs=found.validation_errors.index(found.validation_error) + 1, learning_rate=0.1)
    for name, array in found.weights.items():
        np.testing.assert_array_equal(array, stopped.weights[name])


def test_training_that_only_makes_it_worse_leaves_the_uniform_allocation() -> None:
    training, validation = split_pairs(PAIRS, 0.2)
    flat = [replace(pair, ratios=(pair.target,) * LAYERS) for pair in validation]
    found = fit("mlp", training, flat, epochs=3, batch=8, learning_rate=1e-2, seed=0)
    assert found.validation_error < min(found.validation_errors)
    np.testing.assert_allclose(Predictor("mlp", found.weights, SPACE, SIZE, {}).ratios(0.3), 0.3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_a_law_from_noisy_pairs(name: str) -> None:
    found = train(architecture=name, epochs=64, batch=8)
    between = [0.125, 0.275, 0.425]
    uniform = float(np.mean([(target - law(target)) ** 2 for target in between]))
    assert error(found, between) < uniform / 10


@pytest.mark.parametrize("name", NAMES)
def test_a_dozen_pairs_do(name: str) -> None:
    found = train(noisy([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], each=2, noise=0.03), architecture=name, epochs=64)
    uniform = float(np.mean([(target - law(target)) ** 2 for target in (0.15, 0.45)]))
    assert error(found, (0.15, 0.45)) < uniform / 2


def test_a_pair_counts_by_its_weight() -> None:
    good, validation = split_pairs(noisy([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], each=2, noise=0.0), 0.2)
    bad = [replace(pair, ratios=pair.ratios[::-1]) for pair in good]
    options: dict[str, Any] = {"epochs": 64, "batch": 8, "learning_rate": 1e-3, "seed": 0}
    weighed = fit("mlp", [*good, *(replace(pair, weight=1e-4) for pair in bad)], validation, **options)
    alike = fit("mlp", [*good, *bad], validation, **options)
    assert error(weighed, (0.15, 0.45)) < error(alike, (0.15, 0.45)) / 3


def test_scaling_all_weights_changes_nothing() -> None:
    assert_same(train(), train([replace(pair, weight=2.0) for pair in PAIRS]))


def test_epochs_are_reported() -> None:
    seen: list[tuple[int, float]] = []
    found = train(on_epoch=lambda epoch, least: seen.append((epoch, least)))
    assert seen == list(enumerate(found.validation_errors))
    assert found.seconds > 0


def test_pairs_that_cannot_be_trained_on_are_refused() -> None:
    training, validation = split_pairs(PAIRS, 0.2)
    options: dict[str, Any] = {"epochs": 1, "batch": 8, "learning_rate": 1e-3, "seed": 0}
    with pytest.raises(LopError, match="0 to validate with"):
        fit("mlp", training, [], **options)
    with pytest.raises(LopError, match="8 and 9 layers"):
        fit("mlp", [*training, Pair(0.2, (0.2,) * 9)], validation, **options)
