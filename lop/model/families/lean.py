"""Layers and rotations of transformers' Qwen models, in the form in which `lop.model.backbone` runs them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lop.model.backbone import Layer


def lean_layer(layer: Any, heads: int, key_heads: int) -> Layer:
    """A decoder layer with `heads` query heads and `key_heads` key heads."""
    attention = layer.self_attn
    size = attention.q_proj.weight.shape[0] // heads
    pairs = _pairs(size)
    rotated = ((attention.q_proj, heads), (attention.k_proj, key_heads))

    def interleaved(name: str) -> list[Tensor]:
        return [getattr(part, name).unflatten(0, (count, size))[:, pairs].flatten(0, 1) for part, count in rotated]

    return Layer(
        attention_norm=layer.input_layernorm.weight,
        qkv=torch.cat([*interleaved("weight"), attention.v_proj.weight]),
        qkv_bias=torch.cat([*interleaved("bias"), attention.v_proj.bias]),
        out=attention.o_proj.weight,
        ffn_norm=layer.post_attention_layernorm.weight,
        ffn=layer.mlp,
    )


def projections(layer: Layer, heads: int, key_heads: int) -> list[Tensor]:
    """The weights of queries, keys and values, each with its rows as transformers has them; copies."""
    size = len(layer.qkv) // (heads + 2 * key_heads)
    back = torch.argsort(_pairs(size))
    *rotated, values = layer.qkv.split([heads * size, key_heads * size, key_heads * size])
    return [*(part.unflatten(0, (-1, size))[:, back].flatten(0, 1) for part in rotated), values.clone()]


def project_by(layer: Layer, weights: Sequence[Tensor], heads: int) -> None:
    """Gives a layer other weights of queries, keys and values, as `projections` has them."""
    size = len(weights[0]) // heads
    pairs = _pairs(size)
    *rotated, values = weights
    layer.qkv.copy_(torch.cat([*(part.unflatten(0, (-1, size))[:, pairs].flatten(0, 1) for part in rotated), values]))


def _pairs(size: int) -> Tensor:
    """[size], which of a head's rows stands where: transformers rotates its first half against the second, `Layer` has
    the two halves interleaved."""
    return torch.arange(size).view(2, -1).T.flatten()


def rotation(rotary: Any, positions: Tensor) -> Tensor:
    """M-RoPE's factors [T, D/2], complex, of positions [3, T], by the backbone's own `rotary`."""
    exact = torch.empty(0, device=positions.device)  # Only tells the dtype of the answer.
    sections = rotary.config.rope_parameters["mrope_section"]
    factors = rotary(exact, positions[:, None])
    return torch.complex(*(_by_frequency(factor[..., : factor.shape[-1] // 2], sections) for factor in factors))


def _by_frequency(factors: Tensor, sections: Sequence[int]) -> Tensor:
    """Factors [T, D/2] from [1, T, D/2], or from those of each axis, [3, 1, T, D/2]: older transformers'."""
    if factors.dim() == 4:
        parts = factors.split(list(sections), dim=-1)
        factors = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
    return factors[0]
