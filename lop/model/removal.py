"""The optimal brain surgeon for whole neurons: which to remove one after the other, by the inverse Gram matrix.

As ZipLM (Kurtic et al., NeurIPS 2023, eq. 2 and 3) has it, and DarwinLM (Tang et al., 2025) after it, over the columns
of `down_proj`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lop.model.repair import RIDGE, ridge_added

# Removals between two updates of the whole matrices.
_BLOCK = 64


@dataclass(frozen=True)
class Removal:
    """How a layer's neurons are removed.

    Attributes:
        order: [F], the last to be removed first.
        errors: [F + 1] float64, with k kept: `‖(W − W_k)·C‖² / ‖W·C‖²` for `G + λI = C·Cᵀ`, the share of the output's
            square that is lost with k neurons and the best weights for them; 0 at F, 1 at 0.
    """

    order: np.ndarray
    errors: np.ndarray


@torch.inference_mode()
def remove_greedily(down: Tensor, gram: Tensor, *, ridge: float = RIDGE, block: int = _BLOCK) -> Removal:
    """Removes the neuron of least `Σ_i W_ij² / A_jj`, `A = (G + λI)⁻¹`, until none is left.

    After neuron p is removed, the others make up for it and the inverse forgets it:

        W ← W − W_p·A_p / A_pp,   A ← A − A_pᵀ·A_p / A_pp.

    These weights are those of `lop.model.repair.refitted` with the same λ, so only the order is kept. Neurons that are
    silent in calibration go first, as their weights are taken for zero (the published code does so, too).

    Cost: a rank-one update of both matrices for each removal would move 2·F·(F² + H·F) numbers through memory: 130 TB
    in float64 for a layer with F = 18,944. They are updated `block` removals at a time, by matrix products of F³ + H·F²
    multiplications in all (8·10¹²); between, what is needed of them is made up from the removals since: a row of A and
    one of `Wᵀ·W`, the diagonal of A, and the squares of W's columns. That reads W once a removal: 10 TB for that layer.
    Memory: G, A and the factor between them, [F, F] float64, and W: 9.2 GB for that layer.

    Args:
        down: W, [H, F].
        gram: G, [F, F] float64; is changed.
    """
    weight = down.double()
    weight[:, gram.diagonal() == 0] = 0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridge_added(gram, ridge)))
    whole = float((weight @ gram).mul_(weight).sum())
    neurons = len(gram)
    diagonal, squares = inverse.diagonal().clone(), weight.square().sum(0)
    gone = torch.zeros(neurons, dtype=torch.bool, device=gram.device)
    # Of the removals since the last update: A_p/√A_pp and W_p/√A_pp.
    rows, columns = gram.new_empty(block, neurons), gram.new_empty(block, len(weight))
    removed: list[int] = []
    losses: list[float] = []
    for count in range(neurons):
        since = count % block
        if count and not since:
            inverse.addmm_(rows.T, rows, alpha=-1)
            weight.addmm_(columns.T, rows, alpha=-1)
            weight[:, gone] = 0
            diagonal, squares = inverse.diagonal().clone(), weight.square().sum(0)  # Without what rounding added up.
        scores = (squares.clamp_min(0) / diagonal).masked_fill_(gone, torch.inf)
        neuron = int(scores.argmin())
        removed.append(neuron)
        losses.append(float(scores[neuron]))
        gone[neuron] = True
        before, past = columns[:since], rows[:since]
        root = diagonal[neuron].sqrt()
        row = (inverse[neuron] - past[:, neuron] @ past) / root
        column = weight[:, neuron] - past[:, neuron] @ before
        products = column @ weight - (before @ column) @ past
        share = row / root
        squares += share * (share * squares[neuron] - 2 * products)
        diagonal -= row.square()
        rows[since], columns[since] = row, column / root
    errors = np.append(np.cumsum(losses)[::-1], 0.0) / max(whole, np.finfo(np.float64).tiny)
    return Removal(np.array(removed[::-1]), np.clip(errors, 0.0, 1.0))
