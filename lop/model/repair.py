"""What makes up for pruned units at any width, at hardly any cost: what candidates are scored with.

Both repairs see the dense model's activations; `lop.checkpoint.recovery` refits layer by layer, which takes minutes and
is what ships.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lop.model.backbone import Backbone, Heads
from lop.model.elastic import ElasticFfn
from lop.model.encoding import Encoded
from lop.model.walk import Walk, next_gram, next_grams

# Of the mean square of a layer's activations: what `refit` pulls towards the weights that are there with.
RIDGE = 0.01


class Biases:
    """Adds `W_down[:, pruned] · E[h_pruned]`, as FLAP does (An et al. 2023).

    Args:
        means: [L, F] `E[h]` in the dense model's numbering.
    """

    def __init__(self, means: np.ndarray) -> None:
        self._means = means

    def __call__(self, axis: int, part: ElasticFfn | Heads) -> None:
        """Sets an FFN's bias; attention, whose `o_proj` has none, goes without."""
        if isinstance(part, Heads):
            return
        ffn = part
        expected = torch.from_numpy(self._means[axis]).to(ffn.down.device)[ffn.order][ffn.width :]
        ffn.bias = (ffn.down[:, ffn.width :].double() @ expected).to(ffn.down.dtype)


class Refits:
    """Ridge refit of `down_proj`, and of `o_proj`, at every width from one factor of its inputs.

    With `G + λI = C·Cᵀ`, C lower triangular and neurons (or heads) in the order in which they are kept, the first k
    rows and columns of C are the factor of those of G, so that the weights which minimise
    `Σ ‖V·h_k − W·h‖² + λ‖V − W_k‖²` are

        V = W[:, :k] + (W[:, k:]·C[k:, :k])·C[:k, :k]⁻¹:

    a product and a triangular solve, `2·H·k·(F − k) + H·k²` operations for a width that is new, none for one that is
    kept in memory.

    Args:
        factors: each axis's C, [F, F] float32, in host memory: 4·F² bytes a layer (1.4 GB in a 7B, 9 MB in `smol`);
            axes that are always dense, as attention is by default, need none.
        cache_bytes: for the weights solved for; those unused for longest make room.
    """

    def __init__(self, factors: Sequence[Tensor], *, cache_bytes: int) -> None:
        self._factors = factors
        self._cache_bytes = cache_bytes
        self._known: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._bytes = 0

    def __call__(self, axis: int, part: ElasticFfn | Heads) -> None:
        """Sets the refitted weights."""
        if part.columns in (0, part.whole.shape[1]):
            return
        key = axis, part.columns
        if key in self._known:
            self._known.move_to_end(key)
        else:
            self._keep(key, refitted(part.whole, self._factors[axis], part.columns))
        part.refit(self._known[key])

    def _keep(self, key: tuple[int, int], weights: Tensor) -> None:
        self._known[key] = weights
        self._bytes += weights.nbytes
        while self._bytes > self._cache_bytes and len(self._known) > 1:
            self._bytes -= self._known.popitem(last=False)[1].nbytes


def refitted(down: Tensor, factor: Tensor, width: int) -> Tensor:
    """The weights [H, width] that take the place of `down` [H, F]; see `Refits`.

    Args:
        factor: [F, F], C; may be in host memory.
    """
    rows = factor[:, :width].to(down.device)
    weight = down.float()
    lost = weight[:, width:] @ rows[width:]
    change = torch.linalg.solve_triangular(rows[:width], lost, upper=False, left=False)
    return (weight[:, :width] + change).to(down.dtype)


@torch.inference_mode()
def factors(backbone: Backbone, encoded: Encoded, *, ridge: float = RIDGE, attention: bool = False) -> list[Tensor]:
    """Each axis's factor C of `G + λI`, `G = Σ h·hᵀ` over the tokens, `λ = ridge · mean(diag G)`.

    Memory: one hidden state for each token, in the host's; on the device one batch, and G in float64, twice.

    Args:
        backbone: dense, its layers with an `ElasticFfn` each.
        attention: makes those of the layers' heads, too, which come after those of their FFNs.

    Returns:
        [F, F] or [Q·D, Q·D] float32 each, lower triangular, in host memory.
    """
    walk = Walk(backbone, encoded)
    made = []
    for _ in backbone.layers:
        grams = next_grams(walk) if attention else (next_gram(walk),)
        made.append([factor(gram, ridge=ridge).cpu() for gram in grams])
    return [each for part in zip(*made) for each in part]


def factor(gram: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """C of `G + λI`, [F, F] float32; changes `gram`, G [F, F] float64."""
    # Row after row, as it is once it has been in shared memory: the last digit of a product depends on that.
    return ridged_factor(gram, ridge).float().contiguous()


def ridged_factor(gram: Tensor, ridge: float) -> Tensor:
    """The lower factor of `G + λI`, [F, F] float64, `λ = ridge · mean(diag G)`; changes `gram`, G [F, F] float64."""
    return torch.linalg.cholesky(ridge_added(gram, ridge))


def ridge_added(gram: Tensor, ridge: float) -> Tensor:
    """`G + λI`, in the memory of G [F, F] float64, `λ = ridge · mean(diag G)`."""
    # Neurons that are silent on all tokens leave zeros on the diagonal; anything above zero keeps it solvable.
    gram.diagonal().add_(ridge * gram.diagonal().mean() + torch.finfo(torch.float32).tiny)
    return gram
