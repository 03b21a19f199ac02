"""The optimal brain surgeon for neurons: by hand, by solving anew at every step, by the published rank-one steps."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lop.model.removal import remove_greedily
from lop.model.repair import factor, refitted

RIDGE = 0.01


def layer(seed: int, neurons: int = 13, outputs: int = 4) -> tuple[Tensor, Tensor]:
    """Weights [H, F] and the Gram matrix of activations that depend on each other."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(40, 6, generator=random) @ torch.randn(6, neurons, generator=random)
    hidden += 0.3 * torch.randn(40, neurons, generator=random)
    return torch.randn(outputs, neurons, generator=random), (hidden.T @ hidden).double()


def ridged(gram: Tensor) -> Tensor:
    return gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def test_two_neurons_by_hand() -> None:
    # Independent: the one whose output is less goes first, 1²·4 = 4 of 4 + 3²·1 = 13.
    found = remove_greedily(torch.tensor([[1.0, 3.0]]), torch.diag(torch.tensor([4.0, 1.0])).double(), ridge=0.0)
    assert found.order.tolist() == [1, 0]
    np.testing.assert_allclose(found.errors, [1, 4 / 13, 0], atol=1e-12)
    # The same twice, almost: one of them makes up for the other, and hardly anything is lost.
    twins = torch.tensor([[1.0, 0.999], [0.999, 1.0]]).double()
    assert remove_greedily(torch.tensor([[1.0, 1.0]]), twins, ridge=0.0).errors[1] < 1e-3


@pytest.mark.parametrize("block", [1, 4, 64])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_removal_is_the_best_when_all_is_solved_anew(seed: int, block: int) -> None:
    down, gram = layer(seed)
    inverse, weight = torch.linalg.inv(ridged(gram)), down.double()

    def lost(removed: list[int]) -> float:
        """What is lost where the others have the best weights."""
        part = weight[:, removed]
        return float(torch.trace(part @ torch.linalg.inv(inverse[removed][:, removed]) @ part.T))

    removed: list[int] = []
    errors = [0.0]
    for _ in range(len(gram)):
        removed.append(min(set(range(len(gram))) - set(removed), key=lambda neuron: lost([*removed, neuron])))
        errors.append(lost(removed))
    found = remove_greedily(down, gram.clone(), ridge=RIDGE, block=block)
    assert found.order.tolist() == removed[::-1]
    np.testing.assert_allclose(found.errors, np.array(errors[::-1]) / errors[-1], atol=1e-9)


def test_the_published_steps_give_the_same_order_and_the_weights_of_refit() -> None:
    down, gram = layer(3)
    weight, inverse = down.double(), torch.linalg.inv(ridged(gram))
    kept = 5
    gone: list[int] = []
    while len(gone) < len(gram) - kept:
        scores = weight.square().sum(0) / inverse.diagonal()
        scores[gone] = torch.inf
        neuron = int(scores.argmin())
        row, pivot = inverse[neuron].clone(), float(inverse[neuron, neuron])
        weight = weight - torch.outer(weight[:, neuron] / pivot, row)
        inverse = inverse - torch.outer(row, row) / pivot
        gone.append(neuron)
        weight[:, gone] = 0
    order = remove_greedily(down, gram.clone(), ridge=RIDGE).order
    assert order[kept:][::-1].tolist() == gone
    by_refit = refitted(down[:, order], factor(gram[order][:, order].clone(), ridge=RIDGE), kept)
    np.testing.assert_allclose(by_refit.numpy(), weight[:, order[:kept]].numpy(), atol=1e-4)


def test_what_is_silent_goes_first() -> None:
    down, gram = layer(4)
    gram[[2, 7]], gram[:, [2, 7]] = 0, 0
    assert set(remove_greedily(100 * down, gram).order[-2:]) == {2, 7}
