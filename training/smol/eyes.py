"""What is trained of `smol`: the merger behind `tiny`'s tower, the tokens around an image, and low-rank changes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger, Qwen2_5_VLTextModel

from lop.models import assets
from lop.smol import find_source, read_backbone, smol_assets
from training.smol.architecture import TOKENS

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LowRank(nn.Module):
    """A frozen weight [out, in] in float32 with a trained change `b·a` of low rank, rounded as it will ship."""

    def __init__(self, out: int, into: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, into) * into**-0.5)
        self.b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + self.b @ self.a).bfloat16()


def load_backbone(rank: int) -> Qwen2_5_VLTextModel:
    """SmolLM2 as Qwen2.5-VL's language model: frozen, in bfloat16, its attention open to changes of a rank."""
    config: Qwen2_5_VLTextConfig = AutoConfig.from_pretrained(smol_assets() / "model").text_config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {
        name.removeprefix("model."): values for name, values in read_backbone(find_source(), heads=heads)
    }
    table = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.cat([table, torch.zeros(len(TOKENS), table.shape[1])])
    backbone: Any = Qwen2_5_VLTextModel(config)
    missing, unexpected = backbone.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("_proj.bias") for name in missing)
    backbone.requires_grad_(False)
    for layer in backbone.layers:
        layer.mlp.bfloat16()
        for name in _PROJECTIONS:
            projection = getattr(layer.self_attn, name)
            if projection.bias is not None:
                projection.bias.zero_()
            if rank:
                change = LowRank(*projection.weight.shape, rank)
                parametrize.register_parametrization(projection, "weight", change, unsafe=True)
    backbone.embed_tokens.bfloat16()
    return backbone


class Eyes(nn.Module):
    """The trained parts that are not in the backbone.

    Attributes:
        merger: Qwen2.5-VL's own; takes what `tiny`'s tower hands to its merger.
        tokens: [4, H], rows of the embedding: for `TOKENS`, those of the pads at zero and never read.
    """

    def __init__(self, words: Tensor, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(smol_assets() / "model").vision_config
        self.merger = Qwen2_5_VLPatchMerger(config.out_hidden_size, config.hidden_size, config.spatial_merge_size)
        tiny = tiny_tower()
        self.merger.ln_q.weight.data = tiny["visual.merger.ln_q.weight"].float()
        self.merger.ln_q.requires_grad_(False)
        for name in ("weight", "bias"):
            getattr(self.merger.mlp[0], name).data = tiny[f"visual.merger.mlp.0.{name}"].float()
        length = words.float().norm(dim=1).mean()
        tokens = nn.functional.normalize(torch.randn(len(TOKENS), words.shape[1]), dim=1) * length
        tokens[:2] = 0
        self.tokens = nn.Parameter(tokens)

    def see(self, inputs: Tensor) -> Tensor:
        """Image tokens [..., H] of the merger's normed inputs [..., 1024]."""
        return self.merger.mlp(inputs)


def tiny_tower() -> dict[str, Tensor]:
    """The tensors of `tiny`'s vision tower."""
    weights = load_file(assets() / "model" / "model.safetensors")
    return {name: tensor for name, tensor in weights.items() if name.startswith("visual.")}


def save_eyes(eyes: Eyes, backbone: Any, path: Path) -> None:
    """Writes what ships: the tower with the trained merger, the tokens and the low-rank changes, in bfloat16."""
    tensors = tiny_tower()
    tensors |= {f"visual.merger.{name}": tensor for name, tensor in eyes.merger.state_dict().items()}
    tensors["tokens"] = eyes.tokens.detach()
    tensors |= {f"model.{name}.weight.{part}": tensor for name, change in changes(backbone) for part, tensor in
                (("a", change.a.detach()), ("b", change.b.detach()))}
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}, path)


def changes(backbone: Any) -> Iterator[tuple[str, LowRank]]:
    """The low-rank changes by the name of the projection that they change."""
    for index, layer in enumerate(backbone.layers):
        for name in _PROJECTIONS:
            projection = getattr(layer.self_attn, name)
            if parametrize.is_parametrized(projection):
                yield f"layers.{index}.self_attn.{name}", projection.parametrizations.weight[0]
