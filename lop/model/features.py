"""Measures what a model's layers are like, in numbers without units (`lop.space.features`).

All of it comes from the calibration samples: two passes forward and one back, and no evaluation.
"""

import itertools
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lop.model.backbone import Backbone
from lop.model.elastic import ElasticFfn
from lop.model.encoding import Batch, Encoded
from lop.model.repair import factor
from lop.model.taylor import answers_gradient, run_layer
from lop.model.walk import Walk, next_gram
from lop.space.features import PRUNED, Features

_TINY = 1e-30


def measure_features(backbone: Backbone, encoded: Encoded, *, seed: int = 0) -> Features:
    """Measures them.

    With `G + λI = C·Cᵀ` the error of a refit to the first k neurons is `W[:, k:]·C[k:, k:]`, and C being triangular
    these are the last columns of `W·C`: one product gives the error at every width. The same columns measured by the
    Fisher information of the states after the layer (`_probe`) are what the error costs.

    Memory on the host: H² numbers a layer, and those of `lop.model.walk.next_gram`.

    Args:
        backbone: dense, its layers with an `ElasticFfn` each, sorted by importance.
        seed: of the answers that are drawn from the model's own distributions.
    """
    return _describe(backbone, encoded, _probe(backbone, encoded, seed))


@torch.inference_mode()
def _describe(backbone: Backbone, encoded: Encoded, probe: "_Probe") -> Features:
    walk = Walk(backbone, encoded)
    tokens = sum(map(len, encoded.batches))
    layers = len(backbone.layers)
    curves, scalars = [], []
    for index in range(layers):
        ffn = walk.ffn
        sums = torch.zeros(ffn.neurons, dtype=torch.float64, device=ffn.down.device)

        def add(hidden: Tensor, batch: Batch, part: slice, sums: Tensor = sums) -> None:
            sums.add_(hidden.double().sum(0))

        gram = next_gram(walk, add)
        energy = gram.diagonal().clone()
        constant = float((sums.square() / tokens).sum() / energy.sum())
        columns = ffn.down.float() @ factor(gram)
        output = columns.double().square().sum(0)
        fisher = probe.fisher[index].to(columns.device)
        harm = (columns * (fisher @ columns)).sum(0).double() / (2 * encoded.count * tokens)
        curves.append([_tails(energy, relative=True), _tails(output, relative=True), _tails(harm, relative=False)])
        norms = ffn.down.double().norm(dim=0)
        before, after = probe.energy[index], probe.energy[index + 1]
        pull = probe.pull[index + 1]
        scalars.append(
            [
                (index + 0.5) / layers,
                np.log(layers),
                np.log(probe.change[index] / before),
                probe.dot[index] / np.sqrt(before * after),
                np.log(float(output.sum()) / after),
                np.log(pull * after / (2 * tokens * encoded.count * len(fisher))),
                np.log(pull / probe.pull[0]),
                np.log(float(energy.max() / energy.mean())),
                np.log(float(energy.sum() ** 2 / energy.square().sum()) / ffn.neurons),
                np.log(float(norms.std() / norms.mean()) + _TINY),
                constant,
            ]
        )
    return Features(np.array(curves).transpose(1, 0, 2), np.array(scalars))


def _tails(parts: Tensor, *, relative: bool) -> list[float]:
    """The logarithm of what the last neurons come to at each of `PRUNED`; of the whole, if relative."""
    values = parts.clamp(min=0).cpu().numpy()
    lost = np.interp(np.array(PRUNED) * len(values), np.arange(len(values) + 1), np.append(0.0, values[::-1].cumsum()))
    return [float(x) for x in np.log(np.maximum(lost / (values.sum() if relative else 1.0), _TINY))]


@dataclass(frozen=True)
class _Probe:
    """Sums over all tokens.

    Attributes:
        fisher: each layer's `Σ g·gᵀ` [H, H] float32, in host memory: g is the gradient, with respect to the states
            after the layer, of the log-probability of answers drawn from the model's own distributions.
        energy: `Σ ‖x‖²` of the states before each layer and after the last, L + 1 of them.
        pull: `Σ ‖g‖²` of the same.
        change, dot: `Σ ‖x' − x‖²` and `Σ x'·x` of each layer's states x before and x' after.
    """

    fisher: list[Tensor]
    energy: np.ndarray
    pull: np.ndarray
    change: np.ndarray
    dot: np.ndarray


def _probe(backbone: Backbone, encoded: Encoded, seed: int) -> _Probe:
    """One pass forward and one back over the samples; each layer is run once more on the way back."""
    layers, hidden = len(backbone.layers), len(backbone.norm)
    fisher = [torch.zeros(hidden, hidden) for _ in range(layers)]
    energy, pull, change, dot = np.zeros(layers + 1), np.zeros(layers + 1), np.zeros(layers), np.zeros(layers)
    prose = torch.zeros(encoded.count, dtype=torch.bool)
    prose[list(encoded.prose)] = True
    generator = torch.Generator(device=backbone.norm.device).manual_seed(seed)
    for found in encoded.batches:
        batch = found.copied(backbone.norm.device)
        states = [batch.embeddings]
        with torch.no_grad():
            states += backbone.hidden(batch.embeddings.clone(), batch.rotation, batch.groups)
        for index, (x, after) in enumerate(itertools.pairwise(states)):
            change[index] += float((after - x).double().square().sum())
            dot[index] += float((after.double() * x.double()).sum())
        gradient = _of_drawn(backbone, batch, states[-1], prose.to(backbone.norm.device), generator)
        for index in range(layers, -1, -1):
            energy[index] += float(states[index].double().square().sum())
            pull[index] += float(gradient.double().square().sum())
            if index:
                fisher[index - 1] += (gradient.float().T @ gradient.float()).cpu()
                layer, x = backbone.layers[index - 1], states[index - 1].detach().requires_grad_()
                ffn = cast(ElasticFfn, layer.ffn)
                after = run_layer(backbone, layer, batch, x, [ffn.gate, ffn.up, ffn.down])
                (gradient,) = torch.autograd.grad(after, x, gradient)
    return _Probe(fisher, energy, pull, change, dot)


def _of_drawn(backbone: Backbone, batch: Batch, x: Tensor, prose: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient [N, H], with respect to the states after the last layer, of the log-probability of drawn tokens.

    As in what is compared (`lop.search.scoring.Tally`), the tokens of prose count on average, not in sum; gradients
    enter squared, so that each counts the root.
    """
    lengths = torch.bincount(batch.samples, minlength=len(prose)).clamp(min=1)
    weights = torch.where(prose, lengths.float().rsqrt(), 1.0)[batch.samples]

    def loss(logits: Tensor, part: slice) -> Tensor:
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
        return (F.cross_entropy(logits, drawn, reduction="none") * weights[part]).sum()

    return answers_gradient(backbone, batch, x, loss)
