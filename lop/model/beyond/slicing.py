"""The states that layers hand on, turned onto their principal axes, and cut to the first of these: SliceGPT."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from lop.model.backbone import Backbone, Heads, Layer
from lop.model.beyond.depth import layer_parameters
from lop.model.elastic import ElasticFfn
from lop.model.encoding import Encoded, on_device


@torch.inference_mode()
def principal_axes(backbone: Backbone, encoded: Encoded) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, [H, H] float64 each: the eigenvectors of `Σ x·xᵀ`, those of the largest eigenvalues first.

    The first is of the states x before the layer, the second of those between its attention and its FFN; sums are over
    all tokens.
    """
    device, hidden = backbone.norm.device, len(backbone.norm)
    sums = torch.zeros(len(backbone.layers), 2, hidden, hidden, dtype=torch.float64, device=device)
    for batch in on_device(encoded.batches, device):
        x = batch.embeddings
        for layer, (before, between) in zip(backbone.layers, sums):
            before += _products(x)
            x = backbone.attend(layer, x, batch.rotation, batch.groups)
            between += _products(x)
            x = backbone.feed_forward(layer, x)
    axes = torch.linalg.eigh(sums).eigenvectors.flip(-1)  # Eigenvalues ascend.
    return [(first, second) for first, second in axes]


def _products(x: Tensor) -> Tensor:
    x = x.double()
    return x.T @ x


@torch.inference_mode()
def sliced(backbone: Backbone, axes: Sequence[tuple[Tensor, Tensor]], width: int) -> Backbone:
    """The backbone with states of `width` numbers, the first along each place's axes; at H the same function.

    With Q the first axes [H, k] before a part and Q' those after it, a norm's weights g (which the mean square that it
    divides by does not know, so that a rotation passes through once they are taken out):

        W_in ← W_in·diag(g)·Q,   W_out ← Q'ᵀ·W_out,   the states are multiplied by Qᵀ·Q' on the way around the part,

    W_in being queries, keys and values, or gate and up, whose outputs, biases and rotations by position stay what they
    are. Embeddings, of tokens and images alike, are multiplied by the first Q. After the last FFN stand the states as
    ever, for norm and head. Norms divide by the mean over H still, not over k: see `Backbone.epsilon`.

    Args:
        axes: as `principal_axes` gives them.
        width: k, at most H.
    """
    cut = [turn[:, :width] for pair in axes for turn in pair]
    after = [*cut[1:], torch.eye(len(backbone.norm), dtype=torch.float64, device=backbone.norm.device)]
    layers = [
        _sliced(layer, cut[2 * i], cut[2 * i + 1], after[2 * i + 1], len(backbone.norm))
        for i, layer in enumerate(backbone.layers)
    ]
    return replace(backbone, layers=tuple(layers), entry=cut[0].to(backbone.norm.dtype))


def _sliced(layer: Layer, first: Tensor, second: Tensor, third: Tensor, hidden: int) -> Layer:
    """A layer between three places' axes [H, k], [H, k] and [H, k']."""
    heads, ffn = layer.heads, cast(ElasticFfn, layer.ffn)
    dtype = heads.qkv.dtype
    # `x / sqrt(Σx²/H + ε)` as a norm over k numbers gives it, the sum over k and ε·H/k.
    norm = torch.full((first.shape[1],), (hidden / first.shape[1]) ** 0.5, dtype=dtype, device=heads.qkv.device)

    def inward(weight: Tensor, gain: Tensor, turn: Tensor) -> Tensor:
        return ((weight.double() * gain.double()) @ turn).to(dtype)

    def outward(weight: Tensor, turn: Tensor) -> Tensor:
        return (turn.T @ weight.double()).to(dtype).contiguous()

    gate, up = (inward(weight, layer.ffn_norm, second) for weight in (ffn.gate, ffn.up))
    return Layer(
        attention_norm=norm,
        heads=Heads(
            qkv=inward(heads.qkv, layer.attention_norm, first),
            qkv_bias=heads.qkv_bias,
            out=outward(heads.out, second),
            size=heads.size,
        ),
        ffn_norm=norm,
        ffn=ElasticFfn(gate, up, outward(ffn.down, third), ffn.order),
        attention_turn=(first.T @ second).to(dtype),
        ffn_turn=(second.T @ third).to(dtype),
    )


def sliced_parameters(backbone: Backbone, width: int) -> int:
    """What `lop.model.beyond.depth.parameters` says of `sliced`."""
    hidden = len(backbone.norm)
    lost = hidden - width
    total = hidden * width
    for index, layer in enumerate(backbone.layers):
        ffn = cast(ElasticFfn, layer.ffn)
        is_last = index == len(backbone.layers) - 1
        rows = len(layer.heads.qkv) + layer.heads.out.shape[1] + (2 if is_last else 3) * ffn.neurons + 2
        turns = width * (width + (hidden if is_last else width))
        total += layer_parameters(layer) - lost * rows + turns
    return total


def widest(backbone: Backbone, asked: int) -> int:
    """The most numbers to a state with which at least `asked` parameters are gone; 0 if there is none."""
    dense = sum(map(layer_parameters, backbone.layers))
    fits = (width for width in range(len(backbone.norm), 0, -1) if dense - sliced_parameters(backbone, width) >= asked)
    return next(fits, 0)
