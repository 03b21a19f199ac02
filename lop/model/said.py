"""What attention heads say, number by number: what FLAP ranks them by."""

import numpy as np
import torch
from torch import Tensor

from lop.model.walk import Walk


@torch.inference_mode()
def next_said(walk: Walk) -> dict[str, np.ndarray]:
    """Of the columns of the next layer's `o_proj`, by groups of heads, [K, columns of a group] float64; walks on.

    Args:
        walk: of a dense model, in its own order.

    Returns:
        `said_variance`, the population variance over tokens of what is said there, and `out_l2`, `‖W_o[:, c]‖₂`.
    """
    heads = walk.heads
    found = {"out_l2": heads.whole.double().norm(dim=0), "said_variance": _next_variance(walk)}
    return {name: value.view(heads.groups, -1).cpu().numpy() for name, value in found.items()}


def _next_variance(walk: Walk) -> Tensor:
    out = walk.heads.whole
    near = torch.zeros(out.shape[1], dtype=torch.float64, device=out.device)  # What the first token says.
    sums, squares, tokens = torch.zeros_like(near), torch.zeros_like(near), 0

    def add(part: Tensor) -> None:
        nonlocal tokens
        if not tokens:
            near.copy_(part[0])
        rest = part.double() - near  # So that little is lost where numbers are far from 0.
        sums.add_(rest.sum(0))
        squares.add_(rest.square().sum(0))
        tokens += len(part)

    walk.step(see_heads=add)
    return (squares / tokens - (sums / tokens) ** 2).clamp_min(0)
