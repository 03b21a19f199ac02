"""Whole layers taken out of a backbone: how alike the states around them are, and what makes up for them."""

import math
from collections import deque
from collections.abc import Collection
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lop.errors import LopError
from lop.model.backbone import Backbone, Layer
from lop.model.elastic import ElasticFfn
from lop.model.encoding import Batch, Encoded, on_device
from lop.model.normal import NormalEquations
from lop.model.repair import RIDGE


def layer_parameters(layer: Layer) -> int:
    """How many numbers a layer holds, its turns included."""
    ffn, heads = cast(ElasticFfn, layer.ffn), layer.heads
    own = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum(tensor.numel() for tensor in (*own, heads.qkv, heads.qkv_bias, heads.out, ffn.gate, ffn.up, ffn.down))


def parameters(backbone: Backbone) -> int:
    """How many numbers the layers hold, and what embeddings are multiplied by."""
    entry = 0 if backbone.entry is None else backbone.entry.numel()
    return entry + sum(map(layer_parameters, backbone.layers))


def layers_to_remove(backbone: Backbone, asked: int, extra: int = 0) -> int:
    """The fewest layers that hold `asked` parameters and what takes their place, `extra`, together.

    Raises:
        LopError: those are all layers, or more, or none is asked for.
    """
    if asked <= 0:
        raise LopError("methods that remove layers need a ratio above 0")
    count = math.ceil((asked + extra) / layer_parameters(backbone.layers[0]))
    if count >= len(backbone.layers):
        raise LopError(
            f"{asked:,} parameters less would be all {len(backbone.layers)} layers: name a smaller ratio for methods "
            "that remove layers"
        )
    return count


@torch.inference_mode()
def similarities(backbone: Backbone, encoded: Encoded, span: int) -> np.ndarray:
    """[L − span + 1] float64, `mean_t cos(x_l(t), x_{l+span}(t))` over tokens, `x_l` the states before layer l.

    Memory: on the device `span + 1` states of one batch.
    """
    total = torch.zeros(len(backbone.layers) - span + 1, dtype=torch.float64)
    tokens = 0
    for batch in on_device(encoded.batches, backbone.norm.device):
        window = deque([batch.embeddings], maxlen=span + 1)
        for after, x in enumerate(backbone.hidden(batch.embeddings, batch.rotation, batch.groups), start=1):
            window.append(x)
            if after >= span:
                alike = F.cosine_similarity(window[0].float(), x.float(), dim=1)
                total[after - span] += alike.sum(dtype=torch.float64).cpu()
        tokens += len(batch)
    return (total / tokens).numpy()


def without(backbone: Backbone, removed: Collection[int]) -> Backbone:
    """The backbone without some of its layers."""
    return replace(backbone, layers=tuple(layer for i, layer in enumerate(backbone.layers) if i not in removed))


def with_down(layer: Layer, down: Tensor) -> Layer:
    """The layer with other weights of the last matrix of its FFN, [H, F]."""
    ffn = cast(ElasticFfn, layer.ffn)
    return replace(layer, ffn=ElasticFfn(ffn.gate, ffn.up, down, ffn.order))


@torch.inference_mode()
def bridged(backbone: Backbone, encoded: Encoded, removed: Collection[int]) -> Backbone:
    """The backbone without some of its layers, the layer before each gap refitted to say what the gap did.

    Its `down_proj` is solved for as recovery `refit` does it (`lop.checkpoint.recovery.refit`, all of the error made up
    for), so that the states after it are those of the dense model after the last layer that is gone. What is removed
    before the first layer that stays, nothing makes up for.

    Args:
        backbone: dense, its layers with an `ElasticFfn` each.
    """
    device = backbone.norm.device
    kept = [index for index in range(len(backbone.layers)) if index not in removed]
    dense = [led(backbone, batch, batch.embeddings, 0, kept[0]) for batch in encoded.batches]
    pruned = [batch.embeddings for batch in encoded.batches]
    layers: list[Layer] = []
    for first, after in zip(kept, [*kept[1:], len(backbone.layers)]):
        layer = backbone.layers[first]
        ffn = cast(ElasticFfn, layer.ffn)
        normal = NormalEquations(ffn.down, ffn.neurons) if after > first + 1 else None
        for at, batch in enumerate(encoded.batches):
            residual = backbone.attend(layer, pruned[at].to(device), batch.rotation.to(device), batch.groups)
            dense[at], pruned[at] = led(backbone, batch, dense[at], first, after), residual.cpu()
            if normal:
                normal.add(backbone, layer, residual, dense[at].to(device), catch_up=1.0)
        layers.append(with_down(layer, normal.solve(RIDGE)) if normal else layer)
        pruned = [backbone.feed_forward(layers[-1], x.to(device)).cpu() for x in pruned]
    return replace(backbone, layers=tuple(layers))


def led(backbone: Backbone, batch: Batch, x: Tensor, first: int, after: int) -> Tensor:
    """The states [N, H] of a batch before layer `after`, for those before layer `first`; in host memory."""
    device = backbone.norm.device
    x, rotation = x.to(device), batch.rotation.to(device)
    for layer in backbone.layers[first:after]:
        x = backbone.feed_forward(layer, backbone.attend(layer, x, rotation, batch.groups))
    return x.cpu()


@torch.inference_mode()
def linear_map(backbone: Backbone, encoded: Encoded, first: int, span: int) -> Tensor:
    """A [H, H] for which `x·A` is nearest to what `span` layers from `first` on make of the states x.

    It minimises `Σ ‖x·A − y‖² / ‖y‖²` over tokens, y being the states after those layers, by ridge least squares that
    pulls towards the identity.
    """
    device, hidden = backbone.norm.device, len(backbone.norm)
    normal = NormalEquations(torch.eye(hidden, device=device), hidden)
    for batch in encoded.batches:
        before = led(backbone, batch, batch.embeddings, 0, first)
        after = led(backbone, batch, before, first, first + span)
        x, y = (states.to(device).float() for states in (before, after))
        normal.add_tokens(x, torch.zeros_like(x), y)
    return normal.solve(RIDGE).T.to(backbone.norm.dtype).contiguous()


def turned(backbone: Backbone, turn: Tensor, first: int) -> Backbone:
    """The backbone with its states multiplied by `turn` [H, H] before layer `first`.

    What adds to the states before that takes it up: `(x + W·h)·A = x·A + (Aᵀ·W)·h`.
    """
    if not first:
        return replace(backbone, entry=turn)
    layers = list(backbone.layers)
    layer = layers[first - 1]
    down = turn.T @ cast(ElasticFfn, layer.ffn).down
    layers[first - 1] = replace(with_down(layer, down), ffn_turn=turn)
    return replace(backbone, layers=tuple(layers))
