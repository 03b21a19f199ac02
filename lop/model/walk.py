"""The calibration samples led through the dense layers one by one, with a look at each FFN's neurons."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lop.model.backbone import ROWS, Backbone, Heads, SeeHeads
from lop.model.elastic import ElasticFfn
from lop.model.encoding import Batch, Encoded

# Is shown the activations [n, F] of a batch's tokens, and which tokens of the batch they are.
See = Callable[[Tensor, Batch, slice], None]


class Walk:
    """Stands before a layer, and takes one step a layer.

    Memory: one hidden state for each token, in the host's; on the device one batch.

    Args:
        backbone: dense, its layers with an `ElasticFfn` each.

    Attributes:
        layer: the index of the layer that comes next.
    """

    def __init__(self, backbone: Backbone, encoded: Encoded) -> None:
        self._backbone, self._encoded = backbone, encoded
        self._states = [batch.embeddings for batch in encoded.batches]
        self.layer = 0

    @property
    def ffn(self) -> ElasticFfn:
        """That of the layer that comes next."""
        return cast(ElasticFfn, self._backbone.layers[self.layer].ffn)

    @property
    def heads(self) -> Heads:
        """Those of the layer that comes next."""
        return self._backbone.layers[self.layer].heads

    @torch.inference_mode()
    def step(self, see: See | None = None, see_heads: SeeHeads | None = None) -> None:
        """Leads all samples through the layer; `see` is shown its neurons, and `see_heads` what its heads say."""
        backbone, layer, ffn = self._backbone, self._backbone.layers[self.layer], self.ffn
        device = backbone.norm.device
        for index, batch in enumerate(self._encoded.batches):
            x = backbone.attend(
                layer, self._states[index].to(device), batch.rotation.to(device), batch.groups, see_heads
            )
            for start in range(0, len(x), ROWS):
                part = x[start : start + ROWS]
                hidden = ffn.hidden(backbone.ffn_input(layer, part))
                part.add_(F.linear(hidden, ffn.down))
                if see is not None:
                    see(hidden, batch, slice(start, start + len(part)))
            self._states[index] = x.cpu()
        self.layer += 1


def next_gram(walk: Walk, see: See | None = None) -> Tensor:
    """`G = Σ h·hᵀ` over the tokens, [F, F] float64 on the device, of the layer that comes next; takes the step.

    Args:
        see: is shown the neurons, too.
    """
    gram, add = _summed(walk.ffn.down)

    def both(hidden: Tensor, batch: Batch, tokens: slice) -> None:
        add(hidden)
        if see is not None:
            see(hidden, batch, tokens)

    walk.step(both)
    return gram


def next_grams(walk: Walk) -> tuple[Tensor, Tensor]:
    """`next_gram`, and the same of what the layer's heads say, [Q·D, Q·D]."""
    gram, add = _summed(walk.ffn.down)
    heads_gram, add_heads = _summed(walk.heads.whole)
    walk.step(lambda hidden, batch, tokens: add(hidden), add_heads)
    return gram, heads_gram


def _summed(weight: Tensor) -> tuple[Tensor, SeeHeads]:
    """A matrix of zeros for the inputs of a weight, and what adds tokens' inputs to it."""
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)

    @torch.inference_mode()
    def add(inputs: Tensor) -> None:
        inputs = inputs.float()
        gram.add_(inputs.T @ inputs)  # Products in float32, which every GPU is fast at; sums in float64.

    return gram, add
