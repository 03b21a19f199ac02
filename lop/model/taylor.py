"""First-order Taylor terms of the loss for whole neurons: what LLM-Pruner ranks by (Ma et al., NeurIPS 2023).

The gradient is that of all samples together, so it has to be summed before anything is made of its absolute values: it
is as large as the FFNs' weights, and is kept of some layers at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lop.model.backbone import Backbone, Heads, Layer
from lop.model.elastic import ElasticFfn
from lop.model.encoding import Batch, Encoded

# Tokens whose logits are in memory together.
_LOGITS = 1024


@dataclass(frozen=True)
class Terms:
    """Of the units of n layers, neurons or groups of heads, θ being a unit's weights.

    A neuron's are a row of gate and of up and a column of down; a group's its rows of the projections of queries, keys
    and values, and its columns of `o_proj`.

    Attributes:
        element: [n, units] float64, `Σ_θ |θ·∂L/∂θ|` over all its weights (element-wise, first order).
        vector: [n, units] float64, `Σ |Σ_θ θ·∂L/∂θ|`, the inner sum over each row or column (vector-wise).
    """

    element: np.ndarray
    vector: np.ndarray


def taylor_terms(
    backbone: Backbone, encoded: Encoded, layers: Sequence[int], *, shown: Callable[[int], None] = lambda done: None
) -> Terms:
    """The terms of some layers; L is the negative log-probability of all answers' tokens, prose's included.

    One pass forward and one back, as far as the first of the layers. Each layer is run once more on the way back, so
    that no more than one layer's activations are in memory.

    Memory on the device: the layers' gradients, 12·F·H bytes each in float32; a batch's states before each layer; and
    a layer's activations for the batch, about 8·F numbers a token.

    Args:
        backbone: dense, its layers with an `ElasticFfn` each, in the dense model's order.
        layers: ascending.
        shown: called with the batches done.
    """
    gradients = _gradients(backbone, encoded, layers, _ffn_weights, run_layer, shown)
    each = [coupled(_ffn_weights(backbone.layers[layer]), gradients[layer]) for layer in layers]
    return Terms(*(np.stack([terms[form].cpu().numpy() for terms in each]) for form in range(2)))


def head_terms(
    backbone: Backbone, encoded: Encoded, layers: Sequence[int], *, shown: Callable[[int], None] = lambda done: None
) -> Terms:
    """The terms of the groups of heads of some layers; else as `taylor_terms`.

    Memory on the device: the gradients of the layers' attention, not of their FFNs.
    """
    gradients = _gradients(backbone, encoded, layers, _head_weights, _run_heads, shown)
    each = [coupled_heads(backbone.layers[layer].heads, gradients[layer]) for layer in layers]
    return Terms(*(np.stack([terms[form].cpu().numpy() for terms in each]) for form in range(2)))


# A layer's weights whose gradients are wanted; and the states after the layer, by such weights.
_Weights = Callable[[Layer], list[Tensor]]
_Run = Callable[[Backbone, Layer, Batch, Tensor, Sequence[Tensor]], Tensor]


def _ffn_weights(layer: Layer) -> list[Tensor]:
    ffn = cast(ElasticFfn, layer.ffn)
    return [ffn.gate, ffn.up, ffn.down]


def _head_weights(layer: Layer) -> list[Tensor]:
    return [layer.heads.qkv, layer.heads.out]


def _gradients(
    backbone: Backbone,
    encoded: Encoded,
    layers: Sequence[int],
    weights: _Weights,
    run: _Run,
    shown: Callable[[int], None],
) -> dict[int, list[Tensor]]:
    """By layer the gradients of the loss with respect to its weights, in float32."""
    found = {
        layer: [torch.zeros_like(weight, dtype=torch.float32) for weight in weights(backbone.layers[layer])]
        for layer in layers
    }
    for done, batch in enumerate(encoded.batches, start=1):
        _add_gradients(backbone, batch.copied(backbone.norm.device), found, weights, run)
        shown(done)
    return found


def coupled(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The two terms [F] float64 of one layer's neurons; see `Terms`.

    Args:
        weights, gradients: of gate and up [F, H], and of down [H, F].
    """
    products = [weight.float() * gradient for weight, gradient in zip(weights, gradients)]
    lines = torch.stack([products[0].T, products[1].T, products[2]])
    return lines.abs().sum((0, 1), dtype=torch.float64), lines.sum(1, dtype=torch.float64).abs().sum(0)


def coupled_heads(heads: Heads, gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The two terms [K] float64 of one layer's groups of heads; see `Terms`.

    Args:
        gradients: of `heads.qkv` and `heads.out`.
    """
    rows, columns = (
        weight.float() * gradient for weight, gradient in zip((heads.qkv, heads.out), gradients, strict=True)
    )
    lines = torch.cat([rows, columns.T])  # [queries + keys + values + columns, H]
    held = heads.groups * heads.size
    parts = [heads.columns, held, held, heads.columns]

    def by_group(terms: Tensor) -> Tensor:
        return torch.stack([part.view(heads.groups, -1).sum(1) for part in terms.split(parts)]).sum(0)

    element, vector = lines.abs().sum(1, dtype=torch.float64), lines.sum(1, dtype=torch.float64).abs()
    return by_group(element), by_group(vector)


def _run_heads(backbone: Backbone, layer: Layer, batch: Batch, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    qkv, out = weights
    heads = Heads(qkv, layer.heads.qkv_bias, out, layer.heads.size)
    return run_layer(backbone, replace(layer, heads=heads), batch, x, _ffn_weights(layer))


def _add_gradients(backbone: Backbone, batch: Batch, found: dict[int, list[Tensor]], of: _Weights, run: _Run) -> None:
    states = [batch.embeddings]
    with torch.no_grad():
        states += backbone.hidden(batch.embeddings.clone(), batch.rotation, batch.groups)
    gradient = _of_loss(backbone, batch, states.pop())
    for index in range(len(backbone.layers) - 1, min(found) - 1, -1):
        layer, x = backbone.layers[index], states.pop().requires_grad_()
        weights = [weight.detach().requires_grad_() for weight in of(layer)] if index in found else []
        after = run(backbone, layer, batch, x, weights or of(layer))
        gradient, *mine = torch.autograd.grad(after, [x, *weights], gradient)
        for total, part in zip(found.get(index, []), mine):
            total += part


def run_layer(backbone: Backbone, layer: Layer, batch: Batch, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The states [N, H] after a layer for those before it, with nothing done in place that a gradient needs."""
    gate, up, down = weights
    x = backbone.attend(layer, x, batch.rotation, batch.groups)
    normed = backbone.ffn_input(layer, x)
    return x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)


def _of_loss(backbone: Backbone, batch: Batch, x: Tensor) -> Tensor:
    """The gradient [N, H] of the loss with respect to the states x [N, H] after the last layer."""

    def loss(logits: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(logits, batch.tokens[part], reduction="sum")

    return answers_gradient(backbone, batch, x, loss)


def answers_gradient(backbone: Backbone, batch: Batch, x: Tensor, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """The gradient [N, H] of a sum over answers' tokens with respect to the states x [N, H] after the last layer.

    Args:
        loss: of some tokens' logits [n, V], and which of the batch's tokens they are.
    """
    places = batch.tails[batch.places]
    x = x.detach().requires_grad_()
    gradient = torch.zeros_like(x)
    for start in range(0, len(places), _LOGITS):
        part = slice(start, start + _LOGITS)
        logits = backbone.logits(backbone.normed(x[places[part]])).float()
        gradient += torch.autograd.grad(loss(logits, part), x)[0]
    return gradient
