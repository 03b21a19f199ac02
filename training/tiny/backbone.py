"""The language backbone's forward pass for training: many questions to one image, each as if it stood alone.

The same function as transformers' own forward, computed so that the tokens before the question (the image) are run
once for all questions of the image: a question attends to them and to itself.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def hidden_states(backbone: nn.Module, prefix: Tensor, questions: Tensor, positions: Tensor) -> Tensor:
    """The final hidden states of the questions.

    Args:
        backbone: transformers' language model.
        prefix: [b, P, H], embeddings of what stands before the questions.
        questions: [b, K, S, H], embeddings of each image's questions.
        positions: [3, P + S], M-RoPE of a prefix and a question.

    Returns:
        [b, K, S, H], float32.
    """
    b, p, hidden = prefix.shape
    k, s = questions.shape[1:3]
    flat = torch.cat([prefix.reshape(-1, hidden), questions.reshape(-1, hidden)])
    cos, sin = backbone.rotary_emb(prefix, positions[:, None])
    cos, sin = (torch.cat([x[0, :p].repeat(b, 1), x[0, p:].repeat(b * k, 1)])[:, None].bfloat16() for x in (cos, sin))
    group = backbone.config.num_attention_heads // backbone.config.num_key_value_heads
    past = torch.cat([torch.zeros(s, p), torch.full((s, s), float("-inf")).triu(1)], 1).repeat(group, 1)
    first = torch.full((p, p), float("-inf")).triu(1).repeat(group, 1)
    past, first = past.to(prefix.device), first.to(prefix.device)
    for layer in backbone.layers:
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        queries, keys, values = _project(
            flat,
            layer.input_layernorm.weight,
            *(x.weight for x in projections),
            *(x.bias for x in projections),
            cos,
            sin,
            attention.head_dim,
        )
        split = b * p
        heads = keys.shape[1]
        ahead = [rows(x[:split], b, p, heads) for x in (queries, keys, values)]
        behind = [rows(x[split:], b * k, s, heads) for x in (queries, keys, values)]
        shared = [x.repeat_interleave(k, 0) for x in ahead[1:]]
        seen = attend(ahead[0], ahead[1], ahead[2], first, attention.scaling)
        said = attend(
            behind[0],
            torch.cat([shared[0], behind[1]], 2),
            torch.cat([shared[1], behind[2]], 2),
            past,
            attention.scaling,
        )
        mixed = torch.cat([flatten_heads(seen, p), flatten_heads(said, s)])
        flat = _finish(
            flat,
            mixed,
            attention.o_proj.weight,
            layer.post_attention_layernorm.weight,
            layer.mlp.gate_proj.weight,
            layer.mlp.up_proj.weight,
            layer.mlp.down_proj.weight,
        )
    return normalise(flat[b * p :], backbone.norm.weight).view(b, k, s, hidden)


def normalise(states: Tensor, weight: Tensor) -> Tensor:
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-5) * weight


def _project(
    flat: Tensor,
    norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bias: Tensor,
    k_bias: Tensor,
    v_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [n, heads, size], keys and values [n, key heads, size], turned by their positions."""
    normal = normalise(flat, norm).bfloat16()
    joint = F.linear(normal, torch.cat([q, k, v]).bfloat16(), torch.cat([q_bias, k_bias, v_bias]).bfloat16())
    joint = joint.view(len(flat), -1, size)
    turning = (len(q) + len(k)) // size
    both = joint[:, :turning]
    half = size // 2
    turned = torch.cat([-both[..., half:], both[..., :half]], -1)
    both = both * cos + turned * sin
    heads = len(q) // size
    return both[:, :heads], both[:, heads:], joint[:, turning:]


def rows(states: Tensor, batch: int, length: int, heads: int) -> Tensor:
    """[batch, key heads, (heads of the group ·) length, size]."""
    grouped = states.view(batch, length, heads, -1, states.shape[-1]).permute(0, 2, 3, 1, 4)
    return grouped.reshape(batch, heads, -1, states.shape[-1])


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    weights = (queries @ keys.transpose(-1, -2)).float() * scaling + mask
    return weights.softmax(-1).bfloat16() @ values


def flatten_heads(states: Tensor, length: int) -> Tensor:
    batch, heads, _, size = states.shape
    return states.view(batch, heads, -1, length, size).permute(0, 3, 1, 2, 4).reshape(batch * length, -1)


def _finish(flat: Tensor, mixed: Tensor, out: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The residual stream after attention's output and the FFN."""
    flat = flat + F.linear(mixed, out.bfloat16())
    normal = normalise(flat, norm).bfloat16()
    opened, raised = F.linear(normal, torch.cat([gate, up]).bfloat16()).split(len(gate), -1)
    return flat + F.linear(F.silu(opened) * raised, down.bfloat16())
