"""FFNs that compute some of their neurons only, others for each token, as a small predictor says: DejaVu."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lop.model.backbone import Backbone
from lop.model.beyond.learning import learn
from lop.model.elastic import ElasticFfn
from lop.model.encoding import Encoded

_EPOCHS = 20
_RATE = 1e-2


class ContextualFfn(ElasticFfn):
    """A gated FFN of which each token uses the `width` neurons that a predictor expects most of.

    What is computed here is every neuron, most of them for nothing: a kernel that gathers is what saves.

    Args:
        ffn: all its neurons.
        inward: [r, H].
        outward: [F, r]; the neurons of the highest `outward · inward · x` are used.
        width: how many.
    """

    def __init__(self, ffn: ElasticFfn, inward: Tensor, outward: Tensor, width: int) -> None:
        super().__init__(ffn.gate, ffn.up, ffn.down, ffn.order)
        self.inward, self.outward, self.width = inward, outward, width

    @property
    def predictor_parameters(self) -> int:
        """What the predictor holds on top."""
        return self.inward.numel() + self.outward.numel()

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        expected = F.linear(F.linear(x, self.inward), self.outward)
        hidden = F.silu(F.linear(x, self.gate)) * F.linear(x, self.up)
        return F.linear(hidden * among_most(expected, self.width), self.down)


def among_most(values: Tensor, count: int) -> Tensor:
    """Which of each row's values [..., F] are among its `count` highest, [..., F] of the values' type."""
    chosen = values.topk(count, dim=-1).indices
    return torch.zeros_like(values).scatter_(-1, chosen, 1.0)


def contextual(
    backbone: Backbone, encoded: Encoded, widths: Sequence[int], rank: int, *, epochs: int = _EPOCHS, seed: int = 0
) -> Backbone:
    """The backbone with a predictor for each layer, trained on the calibration samples' tokens.

    Right are the neurons that a token has most of, by `|h_j|·‖W_down[:, j]‖`, as many as are to be used; each neuron is
    a question of yes or no, by binary cross-entropy. All layers see what the dense model's say.

    Memory: in the host's, what one layer's FFN is given for each token.

    Args:
        backbone: dense, its layers with an `ElasticFfn` each.
        widths: [L], neurons that a token uses of each layer.
        rank: r.
    """
    layers = []
    for layer, inputs, width in zip(backbone.layers, _inputs(backbone, encoded), widths, strict=True):
        ffn = cast(ElasticFfn, layer.ffn)
        found = ContextualFfn(ffn, *_predictor(ffn, inputs, width, rank, epochs, seed), width)
        layers.append(replace(layer, ffn=found))
    return replace(backbone, layers=tuple(layers))


@torch.no_grad()
def _inputs(backbone: Backbone, encoded: Encoded) -> Iterator[list[Tensor]]:
    """Layer by layer what its FFN is given [N, H], batch by batch, in host memory."""
    device = backbone.norm.device
    batches = [batch.copied(torch.device("cpu")) for batch in encoded.batches]
    states = [batch.embeddings for batch in batches]
    for layer in backbone.layers:
        inputs = []
        for at, batch in enumerate(batches):
            x = backbone.attend(layer, states[at].to(device), batch.rotation.to(device), batch.groups)
            inputs.append(backbone.ffn_input(layer, x).cpu())
            states[at] = backbone.feed_forward(layer, x).cpu()
        yield inputs


def _predictor(
    ffn: ElasticFfn, inputs: Sequence[Tensor], width: int, rank: int, epochs: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The two matrices [r, H] and [F, r] of a layer's predictor, of the FFN's type."""
    like, draw = ffn.down, torch.Generator().manual_seed(seed)
    shapes = (rank, like.shape[0]), (like.shape[1], rank)
    start = [torch.randn(shape, generator=draw) / math.sqrt(shape[1]) for shape in shapes]
    inward, outward = (matrix.to(like.device).requires_grad_() for matrix in start)
    size = like.float().norm(dim=0)

    def losses() -> Iterator[Tensor]:
        for _ in range(epochs):
            for index in torch.randperm(len(inputs), generator=draw).tolist():
                x = inputs[index].to(like.device)
                with torch.no_grad():
                    right = among_most(ffn.hidden(x).float().abs() * size, width)
                yield F.binary_cross_entropy_with_logits(F.linear(F.linear(x.float(), inward), outward), right)

    learn((inward, outward), losses(), rate=_RATE, steps=max(epochs * len(inputs), 1))
    return inward.detach().to(like.dtype), outward.detach().to(like.dtype)
