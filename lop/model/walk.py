"""The calibration samples led through the dense layers one by one, with a look at each FFN's neurons."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lop.model.backbone import ROWS, Backbone
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

    @torch.inference_mode()
    def step(self, see: See | None = None) -> None:
        """Leads all samples through the layer; `see` is shown its neurons."""
        backbone, layer, ffn = self._backbone, self._backbone.layers[self.layer], self.ffn
        device = backbone.norm.device
        for index, batch in enumerate(self._encoded.batches):
            x = backbone.attend(layer, self._states[index].to(device), batch.rotation.to(device), batch.groups)
            for start in range(0, len(x), ROWS):
                part = x[start : start + ROWS]
                hidden = ffn.hidden(backbone.ffn_input(layer, part))
                part.add_(F.linear(hidden, ffn.down))
                if see is not None:
                    see(hidden, batch, slice(start, start + len(part)))
            self._states[index] = x.cpu()
        self.layer += 1


@torch.inference_mode()
def next_gram(walk: Walk, see: See | None = None) -> Tensor:
    """`G = Σ h·hᵀ` over the tokens, [F, F] float64 on the device, of the layer that comes next; takes the step.

    Args:
        see: is shown the neurons, too.
    """
    ffn = walk.ffn
    gram = torch.zeros(ffn.neurons, ffn.neurons, dtype=torch.float64, device=ffn.down.device)

    def add(hidden: Tensor, batch: Batch, tokens: slice) -> None:
        hidden = hidden.float()
        gram.add_(hidden.T @ hidden)  # Products in float32, which every GPU is fast at; sums in float64.
        if see is not None:
            see(hidden, batch, tokens)

    walk.step(add)
    return gram
