"""One copy of the weights, any allocation: neurons sorted by importance once, then sliced by view."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lop.adapter import Ffn, QwenVL
from lop.allocation import Allocation


class ElasticFfn(nn.Module):
    """A gated FFN that keeps its first `width` neurons.

    The weights are the original module's own tensors, permuted in place; a slice is a view, so a change of width
    copies nothing and a narrower FFN costs proportionally less.
    """

    def __init__(self, ffn: Ffn, order: Tensor) -> None:
        super().__init__()
        self.gate: Tensor = ffn.gate_proj.weight
        self.up: Tensor = ffn.up_proj.weight
        self.down: Tensor = ffn.down_proj.weight
        self.act = ffn.act_fn
        self.neurons = self.down.shape[1]
        self.order = torch.arange(self.neurons, device=self.down.device)
        self.width = self.neurons
        self.bias: Tensor | None = None
        self.sort(order)

    @torch.no_grad()
    def sort(self, order: Tensor) -> None:
        """Permutes the neurons so that `order`, in the dense model's numbering, comes first to last."""
        order = order.to(self.order.device)
        move = torch.argsort(self.order)[order]
        self.gate.copy_(self.gate[move])
        self.up.copy_(self.up[move])
        self.down.copy_(self.down[:, move])
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        hidden = self.act(F.linear(x, self.gate[: self.width])) * F.linear(x, self.up[: self.width])
        return F.linear(hidden, self.down[:, : self.width], self.bias)


class ElasticModel:
    """A dense model that takes the shape of any allocation in O(L).

    Args:
        model: is changed in place: its FFNs are replaced by elastic ones over the same weights.
        order: [L, F] neurons of each layer, the most important first, in the dense model's numbering.
    """

    def __init__(self, model: QwenVL, order: np.ndarray) -> None:
        self.model = model
        self._ffns: list[ElasticFfn] = []
        for layer, ffn, row in zip(model.layers, model.ffns, torch.from_numpy(order), strict=True):
            elastic = ElasticFfn(ffn, row)
            layer.mlp = elastic
            self._ffns.append(elastic)

    def sort(self, order: np.ndarray) -> None:
        """Changes the order [L, F] in which neurons are kept."""
        for ffn, row in zip(self._ffns, torch.from_numpy(order), strict=True):
            ffn.sort(row)

    def prune(self, allocation: Allocation, means: np.ndarray | None = None) -> None:
        """Takes the allocation's widths.

        Args:
            means: [L, F] `E[h]` in the dense model's numbering: adds `W_down[:, pruned] · E[h_pruned]` as a bias
                (FLAP's compensation). None adds no bias.
        """
        for layer, (ffn, width) in enumerate(zip(self._ffns, allocation.widths, strict=True)):
            ffn.width = width
            ffn.bias = None if means is None else _compensation(ffn, width, means[layer])

    def restore(self) -> None:
        """Takes the dense shape again."""
        self.prune(Allocation(tuple(ffn.neurons for ffn in self._ffns)))

    @contextmanager
    def pruned(self, allocation: Allocation, means: np.ndarray | None = None) -> Iterator[None]:
        """The allocation's widths inside the block, the dense shape after it."""
        self.prune(allocation, means)
        try:
            yield
        finally:
            self.restore()


def _compensation(ffn: ElasticFfn, width: int, means: np.ndarray) -> Tensor:
    expected = torch.from_numpy(means).to(ffn.down.device)[ffn.order][width:]
    return (ffn.down[:, width:].double() @ expected).to(ffn.down.dtype)
