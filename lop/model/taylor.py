"""First-order Taylor terms of the loss for whole neurons: what LLM-Pruner ranks by (Ma et al., NeurIPS 2023).

The gradient is that of all samples together, so it has to be summed before anything is made of its absolute values: it
is as large as the FFNs' weights, and is kept of some layers at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lop.model.backbone import Backbone, Layer
from lop.model.elastic import ElasticFfn
from lop.model.encoding import Batch, Encoded

# Tokens whose logits are in memory together.
_LOGITS = 1024


@dataclass(frozen=True)
class Terms:
    """Of the neurons of n layers, each coupled as a row of gate and of up and a column of down, θ being its weights.

    Attributes:
        element: [n, F] float64, `Σ_θ |θ·∂L/∂θ|` over all its weights (element-wise, first order).
        vector: [n, F] float64, `Σ |Σ_θ θ·∂L/∂θ|`, the inner sum over each row or column (vector-wise).
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
    ffns = [cast(ElasticFfn, backbone.layers[layer].ffn) for layer in layers]
    found = {
        layer: [torch.zeros_like(weight, dtype=torch.float32) for weight in (ffn.gate, ffn.up, ffn.down)]
        for layer, ffn in zip(layers, ffns)
    }
    for done, batch in enumerate(encoded.batches, start=1):
        _add_gradients(backbone, batch.copied(backbone.norm.device), found)
        shown(done)
    each = [coupled((ffn.gate, ffn.up, ffn.down), gradients) for ffn, gradients in zip(ffns, found.values())]
    return Terms(*(np.stack([terms[form].cpu().numpy() for terms in each]) for form in range(2)))


def coupled(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The two terms [F] float64 of one layer's neurons; see `Terms`.

    Args:
        weights, gradients: of gate and up [F, H], and of down [H, F].
    """
    products = [weight.float() * gradient for weight, gradient in zip(weights, gradients)]
    lines = torch.stack([products[0].T, products[1].T, products[2]])
    return lines.abs().sum((0, 1), dtype=torch.float64), lines.sum(1, dtype=torch.float64).abs().sum(0)


def _add_gradients(backbone: Backbone, batch: Batch, found: dict[int, list[Tensor]]) -> None:
    states = [batch.embeddings]
    with torch.no_grad():
        states += backbone.hidden(batch.embeddings.clone(), batch.rotation, batch.groups)
    gradient = _of_loss(backbone, batch, states.pop())
    for index in range(len(backbone.layers) - 1, min(found) - 1, -1):
        layer, x = backbone.layers[index], states.pop().requires_grad_()
        ffn = cast(ElasticFfn, layer.ffn)
        weights = [w.detach().requires_grad_() for w in (ffn.gate, ffn.up, ffn.down)] if index in found else []
        after = run_layer(backbone, layer, batch, x, weights or [ffn.gate, ffn.up, ffn.down])
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
