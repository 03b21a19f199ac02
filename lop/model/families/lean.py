"""Layers and rotations of transformers' Qwen models, in the form in which `lop.model.backbone` runs them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lop.model.backbone import Heads, Layer


def lean_layer(layer: Any) -> Layer:
    """A decoder layer, dense or pruned."""
    attention = layer.self_attn
    size = attention.head_dim
    pairs = _pairs(size)

    def interleaved(name: str) -> list[Tensor]:
        parts = (getattr(part, name) for part in (attention.q_proj, attention.k_proj))
        return [part.unflatten(0, (len(part) // size, size))[:, pairs].flatten(0, 1) for part in parts]

    heads = Heads(
        qkv=torch.cat([*interleaved("weight"), attention.v_proj.weight]),
        qkv_bias=torch.cat([*interleaved("bias"), attention.v_proj.bias]),
        out=attention.o_proj.weight,
        size=size,
    )
    return Layer(
        attention_norm=layer.input_layernorm.weight,
        heads=heads,
        ffn_norm=layer.post_attention_layernorm.weight,
        ffn=layer.mlp,
    )


def projections(heads: Heads) -> list[Tensor]:
    """The weights of queries, keys and values, each with its rows as transformers has them; copies."""
    size, held = heads.size, heads.width * heads.size
    back = torch.argsort(_pairs(size))
    *rotated, values = heads.qkv.split([heads.columns, held, held])
    return [*(part.unflatten(0, (-1, size))[:, back].flatten(0, 1) for part in rotated), values.clone()]


def project_by(heads: Heads, weights: Sequence[Tensor]) -> None:
    """Gives heads other weights of queries, keys and values, as `projections` has them."""
    size = heads.size
    pairs = _pairs(size)
    *rotated, values = weights
    heads.project(torch.cat([*(part.unflatten(0, (-1, size))[:, pairs].flatten(0, 1) for part in rotated), values]))


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
