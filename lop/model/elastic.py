"""One copy of the weights, any allocation: neurons sorted by importance once, then sliced by view."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lop.model.adapter import Ffn, QwenVL
from lop.model.backbone import Heads
from lop.space.allocation import Allocation

_BACKEND = "inductor"


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate)·up`, in the memory of `gate`."""
    return F.silu(gate, inplace=True).mul_(up)


@cache
def fused_gated() -> Callable[[Tensor, Tensor], Tensor]:
    """`gated` compiled to one pass over memory: once, for any number of tokens and any width."""
    return torch.compile(gated, dynamic=True, backend=_BACKEND)


class ElasticFfn(nn.Module):
    """A gated FFN that keeps its first `width` neurons.

    The weights are the given tensors themselves; a slice is a view, so a change of width copies nothing and a narrower
    FFN costs proportionally less.

    Args:
        gate, up: [F, H].
        down: [H, F].
        order: [F], the neurons in the order in which they stand, in the dense model's numbering.

    Attributes:
        width: neurons kept.
        bias: [H], added to the output.
        refitted: [H, width], in the place of `down[:, :width]` where recovery has solved for other weights.
    """

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, order: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down
        self.neurons = down.shape[1]
        self.order = order
        self.width = self.neurons
        self.bias: Tensor | None = None
        self.refitted: Tensor | None = None
        self.is_compiled = False

    @classmethod
    def replacing(cls, ffn: Ffn) -> "ElasticFfn":
        """The elastic form of a dense FFN, over the same tensors."""
        gate, up, down = ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight
        return cls(gate, up, down, torch.arange(down.shape[1], device=down.device))

    @torch.no_grad()
    def sort(self, order: Tensor) -> None:
        """Permutes the neurons so that `order`, in the dense model's numbering, comes first to last."""
        order = order.to(self.order.device)
        move = torch.argsort(self.order)[order]
        self.gate.copy_(self.gate[move])
        self.up.copy_(self.up[move])
        self.down.copy_(self.down[:, move])
        self.order = order

    @property
    def whole(self) -> Tensor:
        """`down` of all neurons."""
        return self.down

    @property
    def columns(self) -> int:
        """How many of the columns of `whole` are kept."""
        return self.width

    def keep(self, width: int) -> None:
        """Keeps the first neurons, as they are."""
        self.width, self.refitted, self.bias = width, None, None

    def refit(self, down: Tensor) -> None:
        """Takes other weights [H, width] in the place of `down`."""
        self.refitted = down

    def weight_squares(self) -> Tensor:
        """[F] float64, the sum of squares of each neuron's weights."""
        lines = (self.gate, self.up, self.down.T)
        return torch.stack([line.double().square().sum(1) for line in lines]).sum(0)

    def hidden(self, x: Tensor) -> Tensor:
        """[..., H] to the kept neurons' activations [..., width]."""
        product = fused_gated() if self.is_compiled else gated
        return product(F.linear(x, self.gate[: self.width]), F.linear(x, self.up[: self.width]))

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        down = self.down[:, : self.width] if self.refitted is None else self.refitted
        return F.linear(self.hidden(x), down, self.bias)


class Repair(Protocol):
    """Makes up for what an axis has just lost; see `lop.model.repair`."""

    def __call__(self, axis: int, part: ElasticFfn | Heads) -> None:
        """Sets an FFN's bias, or refits the part."""


class ElasticModel:
    """A dense model that takes the shape of any allocation in O(L).

    Args:
        model: is changed in place: its FFNs are replaced by elastic ones over the same weights.
        order: [L, F] neurons of each layer, the most important first, in the dense model's numbering.
        compiled: as `compile` does it.
        groups: [L, K] the same for the groups of attention, where these are pruned.

    Attributes:
        backbone: runs with the widths that the model has.
    """

    def __init__(
        self, model: QwenVL, order: np.ndarray, *, compiled: bool = False, groups: np.ndarray | None = None
    ) -> None:
        for index, ffn in enumerate(model.ffns):
            model.replace_ffn(index, ElasticFfn.replacing(ffn))
        self.backbone = model.lean_backbone()
        self.sort(order, groups)
        if compiled:
            self.compile()

    @property
    def widths(self) -> tuple[int, ...]:
        """The neurons that each layer keeps now."""
        return tuple(ffn.width for ffn in self._ffns)

    @property
    def neurons(self) -> int:
        """`F`, of each dense layer."""
        return self._ffns[0].neurons

    def weight_squares(self) -> np.ndarray:
        """[L, F] float64, the sum of squares of each neuron's weights, in the order in which neurons are kept."""
        return np.stack([ffn.weight_squares().cpu().numpy() for ffn in self._ffns])

    @property
    def _ffns(self) -> list[ElasticFfn]:
        return [cast(ElasticFfn, layer.ffn) for layer in self.backbone.layers]

    def sort(self, order: np.ndarray, groups: np.ndarray | None = None) -> None:
        """Changes the order [L, F] in which neurons are kept, and that [L, K] of groups of attention if it is given."""
        for ffn, row in zip(self._ffns, torch.from_numpy(order), strict=True):
            ffn.sort(row)
        if groups is not None:
            for layer, row in zip(self.backbone.layers, torch.from_numpy(groups), strict=True):
                layer.heads.sort(row)

    def prune(self, allocation: Allocation, repair: Repair | None = None) -> None:
        """Takes the allocation's widths, and what `repair` makes of each part with its width.

        Where the allocation is of FFNs alone, attention is dense.
        """
        layers, widths = self.backbone.layers, allocation.widths
        for axis, (ffn, width) in enumerate(zip(self._ffns, widths)):
            ffn.keep(width)
            if repair:
                repair(axis, ffn)
        kept = widths[len(layers) :] or [layer.heads.groups for layer in layers]
        for axis, (layer, width) in enumerate(zip(layers, kept, strict=True), start=len(layers)):
            layer.heads.keep(width)
            if repair and width < layer.heads.groups:
                repair(axis, layer.heads)

    def first_pruned(self, allocation: Allocation) -> int:
        """The first layer of which an allocation prunes anything; L if there is none."""
        layers = self.backbone.layers
        dense = [self.neurons] * len(layers) + [layer.heads.groups for layer in layers]
        lost = (axis % len(layers) for axis, width in enumerate(allocation.widths) if width != dense[axis])
        return min(lost, default=len(layers))

    def compile(self) -> None:
        """Has the FFNs' activations compiled when they are first run; changes results by rounding."""
        for ffn in self._ffns:
            ffn.is_compiled = True

    def restore(self) -> None:
        """Takes the dense shape again."""
        self.prune(Allocation(tuple(ffn.neurons for ffn in self._ffns)))

    @contextmanager
    def pruned(self, allocation: Allocation, repair: Repair | None = None) -> Iterator[None]:
        """The allocation's widths inside the block, the dense shape after it."""
        self.prune(allocation, repair)
        try:
            yield
        finally:
            self.restore()
