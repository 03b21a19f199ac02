"""A vision tower of blocks with `norm1`, `attn`, `norm2` and `mlp` in memory that does not grow with a photograph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision


@contextmanager
def sliced(tower: Any, most: int) -> Iterator[None]:
    """Has the tower's modules work on at most so many patches at a time, for as long as the block lasts."""
    unit = tower.spatial_merge_size**2
    changed = {block: partial(_block, block, block.forward, most) for block in tower.blocks}
    for module, rows in ((tower.patch_embed, most), (tower.merger, max(most // unit, 1) * unit)):
        changed[module] = partial(_by_rows, module.forward, rows)
    for module, forward in changed.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _by_rows(forward: Callable[[Tensor], Tensor], rows: int, x: Tensor) -> Tensor:
    return torch.cat([forward(part) for part in x.split(rows)])


def _block(
    block: Any,
    forward: Callable[..., Tensor],
    most: int,
    x: Tensor,
    *,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **others: Any,
) -> Tensor:
    """A block of the tower on x [N, D], in place: as many whole windows, or images, at a time as may be.

    Args:
        forward: the block's own.
        cu_seqlens: where each window or image starts, and where the last one ends.
        position_embeddings: cosines and sines, each [N, D/heads].
    """
    for start, end in _spans(cu_seqlens.tolist(), most):
        here, rotation = x[start:end], (position_embeddings[0][start:end], position_embeddings[1][start:end])
        if end - start > most:
            _long(block, most, here, rotation)
        else:
            bounds = cu_seqlens[(cu_seqlens >= start) & (cu_seqlens <= end)] - start
            here.copy_(forward(here, cu_seqlens=bounds, position_embeddings=rotation, **others))
    return x


def _spans(bounds: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring sequences together, up to `most` patches; a longer sequence alone."""
    start = end = bounds[0]
    for bound in bounds[1:]:
        if bound - start > most and end > start:
            yield start, end
            start = end
        end = bound
    yield start, end


def _long(block: Any, most: int, x: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
    """A block on one image x [N, D] whose patches all look at each other, in place, slice by slice."""
    attention = block.attn
    query, key, value = x.new_empty(3, attention.num_heads, len(x), attention.head_dim)
    slices = [slice(start, start + most) for start in range(0, len(x), most)]
    for rows in slices:
        parts = attention.qkv(block.norm1(x[rows])).unflatten(1, (3, attention.num_heads, -1)).transpose(0, 1)
        turned = apply_rotary_pos_emb_vision(parts[0], parts[1], rotation[0][rows], rotation[1][rows])
        for whole, part in zip((query, key, value), (*turned, parts[2])):
            whole[:, rows] = part.transpose(0, 1)
    for rows in slices:
        seen = F.scaled_dot_product_attention(query[None, :, rows], key[None], value[None], scale=attention.scaling)
        x[rows] += attention.proj(seen[0].transpose(0, 1).flatten(1))
        x[rows] += block.mlp(block.norm2(x[rows]))
