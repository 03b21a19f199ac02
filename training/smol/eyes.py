"""What is trained of `smol` beside its language model: the merger behind `tiny`'s tower, and what frames images."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger

from lop.model.find import assets
from lop.model.smol import NAME
from training.smol.architecture import TOKENS
from training.smol.backbone import Backbone


class Eyes(nn.Module):
    """The trained parts that are not in the language model.

    Attributes:
        merger: Qwen2.5-VL's own; takes what `tiny`'s tower hands to its merger.
        tokens: [4, H], rows of the embedding: for `TOKENS`, those of the pads at zero and never read.
    """

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(assets(NAME) / "model").vision_config
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


def save_eyes(eyes: Eyes, backbone: Backbone, path: Path) -> None:
    """Writes what ships: the tower with the trained merger, the tokens and the low-rank changes, in bfloat16."""
    tensors = tiny_tower()
    tensors |= {f"visual.merger.{name}": tensor for name, tensor in eyes.merger.state_dict().items()}
    tensors["tokens"] = eyes.tokens.detach()
    tensors |= dict(backbone.changes())
    # Copies, as some of them share memory.
    save_file({name: tensor.to("cpu", torch.bfloat16, copy=True) for name, tensor in tensors.items()}, path)
