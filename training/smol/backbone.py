"""The frozen language model with its trained changes, as plain tensors that training runs fast on.

The same function as transformers' own forward pass; many questions to one image, as in `training.tiny.backbone`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from lop.model.find import assets
from lop.model.smol import NAME, find_source, read_backbone
from training.tiny.backbone import attend, flatten_heads, normalise, rows


class LowRank(nn.Module):
    """A trained change `b·a` of low rank of a frozen projection [out, in]; zero at first."""

    def __init__(self, out: int, into: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, into) * into**-0.5)
        self.b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a.bfloat16()), self.b.bfloat16())


@dataclass(frozen=True)
class Frozen:
    """One layer's weights: norms in float32, [H]; projections in bfloat16, queries, keys and values in one."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    ffn_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Backbone(nn.Module):
    """SmolLM2 with low-rank changes of each layer's attention.

    Attributes:
        table: [V, H], the frozen embedding, which is the head, too; without the rows for images.
        qkv, out: the changes of each layer, the only parameters.
    """

    table: Tensor

    def __init__(self, rank: int) -> None:
        super().__init__()
        config: Any = AutoConfig.from_pretrained(assets(NAME) / "model").text_config
        weights = dict(read_backbone(find_source(), config.to_dict()))
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = config.hidden_size // self.heads
        self.register_buffer("table", weights["model.embed_tokens.weight"].bfloat16(), persistent=False)
        self.register_buffer("norm", weights["model.norm.weight"], persistent=False)
        self.rotary = Qwen2_5_VLRotaryEmbedding(config)
        self.layers = [_frozen(weights, f"model.layers.{i}.") for i in range(config.num_hidden_layers)]
        hidden, joint = config.hidden_size, (self.heads + 2 * self.key_heads) * self.size
        self.qkv = nn.ModuleList(LowRank(joint, hidden, rank) for _ in self.layers)
        self.out = nn.ModuleList(LowRank(hidden, hidden, rank) for _ in self.layers)

    def forward(
        self, prefix: Tensor, questions: Tensor, positions: Tensor, *, probed: int, changed: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The questions' states after layer `probed`, and after all and the last norm, each [b, K, S, H], float32.

        See `training.tiny.backbone.hidden_states`.

        Args:
            prefix: [b, P, H], embeddings of what stands before the questions.
            questions: [b, K, S, H].
            positions: [3, P + S].
            changed: whether with the changes, or as pretrained.
        """
        b, p, hidden = prefix.shape
        k, s = questions.shape[1:3]
        split, heads = b * p, self.key_heads
        flat = torch.cat([prefix.reshape(-1, hidden), questions.reshape(-1, hidden)])
        turns = [x[0] for x in self.rotary(prefix, positions[:, None])]
        cos, sin = (torch.cat([x[:p].repeat(b, 1), x[p:].repeat(b * k, 1)])[:, None].bfloat16() for x in turns)
        group = self.heads // heads
        infinite = float("-inf")
        past = torch.cat([torch.zeros(s, p), torch.full((s, s), infinite).triu(1)], 1).repeat(group, 1)
        first = torch.full((p, p), infinite).triu(1).repeat(group, 1)
        past, first = past.to(flat.device), first.to(flat.device)
        for index, (layer, qkv, out) in enumerate(zip(self.layers, self.qkv, self.out)):
            normal = normalise(flat, layer.attention_norm).bfloat16()
            joint = F.linear(normal, layer.qkv)
            joint = (joint + qkv(normal) if changed else joint).view(len(flat), -1, self.size)
            queries, keys, values = joint.split([self.heads, heads, heads], 1)
            queries, keys = (x * cos + _half_turned(x) * sin for x in (queries, keys))
            ahead = [rows(x[:split], b, p, heads) for x in (queries, keys, values)]
            behind = [rows(x[split:], b * k, s, heads) for x in (queries, keys, values)]
            both = (torch.cat([x.repeat_interleave(k, 0), y], 2) for x, y in zip(ahead[1:], behind[1:]))
            seen = attend(*ahead, first, self.size**-0.5)
            said = attend(behind[0], *both, past, self.size**-0.5)
            mixed = torch.cat([flatten_heads(seen, p), flatten_heads(said, s)])
            flat = flat + F.linear(mixed, layer.out) + (out(mixed) if changed else 0)
            opened, raised = F.linear(normalise(flat, layer.ffn_norm).bfloat16(), layer.gate_up).chunk(2, -1)
            flat = flat + F.linear(F.silu(opened) * raised, layer.down)
            if index == probed:
                between = flat[split:].view(b, k, s, hidden)
        return between, normalise(flat[split:], self.norm).view(b, k, s, hidden)

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """The trained tensors as the checkpoint names the projections that they change, with `.a` and `.b`."""
        sizes = {"q_proj": self.heads * self.size, **dict.fromkeys(("k_proj", "v_proj"), self.key_heads * self.size)}
        for index, (qkv, out) in enumerate(zip(self.qkv, self.out)):
            prefix = f"model.layers.{index}.self_attn."
            for (name, _), part in zip(sizes.items(), qkv.b.detach().split(list(sizes.values()))):
                yield f"{prefix}{name}.weight.a", qkv.a.detach()
                yield f"{prefix}{name}.weight.b", part
            yield f"{prefix}o_proj.weight.a", out.a.detach()
            yield f"{prefix}o_proj.weight.b", out.b.detach()

    def _apply(self, fn: Any, recurse: bool = True) -> "Backbone":
        super()._apply(fn, recurse)
        self.layers = [Frozen(**{name: fn(tensor) for name, tensor in vars(layer).items()}) for layer in self.layers]
        return self


def _frozen(weights: Mapping[str, Tensor], prefix: str) -> Frozen:
    def joint(*names: str) -> Tensor:
        return torch.cat([weights[f"{prefix}{name}_proj.weight"] for name in names]).bfloat16()

    return Frozen(
        attention_norm=weights[f"{prefix}input_layernorm.weight"],
        qkv=joint("self_attn.q", "self_attn.k", "self_attn.v"),
        out=joint("self_attn.o"),
        ffn_norm=weights[f"{prefix}post_attention_layernorm.weight"],
        gate_up=joint("mlp.gate", "mlp.up"),
        down=joint("mlp.down"),
    )


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
