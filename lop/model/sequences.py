"""How strongly each neuron answers to each sequence: what Minitron ranks neurons by."""

import numpy as np
import torch
from torch import Tensor

from lop.model.backbone import Backbone
from lop.model.encoding import Batch, Encoded
from lop.model.walk import Walk


@torch.inference_mode()
def sequence_squares(backbone: Backbone, encoded: Encoded) -> np.ndarray:
    """[L, F] float64, `Σ_s (1/T_s · Σ_t |h_j(x_st)|)²` over sequences s of T_s tokens each.

    The square of Minitron's l2 (over sequences) of means (over tokens): what parts of the samples have, adds up.

    Args:
        backbone: dense, its layers with an `ElasticFfn` each, in the dense model's order.
    """
    walk = Walk(backbone, encoded)
    return np.stack([_next_squares(walk) for _ in backbone.layers])


def _next_squares(walk: Walk) -> np.ndarray:
    sums: dict[int, Tensor] = {}
    lengths: dict[int, Tensor] = {}

    def add(hidden: Tensor, batch: Batch, tokens: slice) -> None:
        if id(batch) not in sums:
            sizes = torch.tensor([group.length for group in batch.groups for _ in range(group.count)])
            lengths[id(batch)] = sizes.to(hidden.device)
            sums[id(batch)] = torch.zeros(len(sizes), hidden.shape[1], dtype=torch.float64, device=hidden.device)
        sizes = lengths[id(batch)]
        # Tokens are seen some at a time, and a sequence may be cut between them.
        owners = torch.arange(len(sizes), device=hidden.device).repeat_interleave(sizes)[tokens]
        sums[id(batch)].index_add_(0, owners, hidden.double().abs())

    walk.step(add)
    means = [found / lengths[key][:, None] for key, found in sums.items()]
    return torch.stack([mean.square().sum(0) for mean in means]).sum(0).cpu().numpy()
