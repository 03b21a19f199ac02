"""A model of any family as LOP opens and touches it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lop.errors import LopError, first_line
from lop.model.backbone import Backbone, Layer
from lop.model.families.family import Family
from lop.model.families.registry import FAMILIES
from lop.model.rounding import check_library
from lop.model.sources import check_checkpoint, family_of, is_quantised, read_weights
from lop.model.tensors import ffn_part
from lop.storage.files import read_json

# The least size of an FFN's matrices from which a CPU is asked for bfloat16.
_LEAST_WIDTH = 256


class Ffn(Protocol):
    """A gated feed-forward network: `down(silu(gate(x)) * up(x))`."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear


@dataclass(frozen=True)
class QwenVL:
    """A loaded model with its processor, seen through the few names that LOP needs: what its family says of it."""

    model: Any
    processor: Any

    @property
    def family(self) -> Family:
        return FAMILIES[self.model.config.model_type]

    @property
    def backbone(self) -> nn.Module:
        """The language model without its head: `inputs_embeds` [B, T, H] to hidden states [B, T, H]."""
        return cast(nn.Module, self.model.get_submodule(self.family.backbone))

    @property
    def tower(self) -> Any:
        """The vision tower, as transformers built it."""
        return self.model.get_submodule(self.family.tower)

    @property
    def head(self) -> nn.Module:
        """Hidden states [N, H] to logits [N, V]."""
        return cast(nn.Module, self.model.get_submodule(self.family.head))

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, first to last."""
        return list(cast(Any, self.backbone).layers)

    @property
    def ffns(self) -> list[Ffn]:
        """Each layer's FFN, first to last."""
        return [cast(Ffn, getattr(layer, self.family.ffn)) for layer in self.layers]

    def replace_ffn(self, index: int, ffn: nn.Module) -> None:
        """Puts another FFN into a layer."""
        setattr(self.layers[index], self.family.ffn, ffn)

    def lean_backbone(self) -> Backbone:
        """The language model as `lop.model.backbone` runs it: the same norms, FFNs and head, the projections copied."""
        return self.family.lean_backbone(self.model)

    def lean_layer(self, index: int) -> Layer:
        """One layer of `lean_backbone`."""
        return self.family.lean_layer(self.model, index)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.model.device)

    def image_features(self, pixels: Tensor, grids: Tensor) -> tuple[Tensor, ...]:
        """Each image's embeddings [tokens, H], from the vision tower."""
        return self.family.image_features(self.model, pixels, grids)

    def token_embeddings(self, ids: Tensor) -> Tensor:
        """Embeddings [..., H] of token ids [...]."""
        return cast(Tensor, self.model.get_input_embeddings()(ids))

    def positions(self, ids: Tensor, token_types: Tensor, grid: Tensor | None) -> Tensor:
        """M-RoPE positions [3, T] of one sequence [T], with the grid of its image if it has one."""
        return self.family.positions(self.model, ids, token_types, grid)

    def rotation(self, positions: Tensor) -> Tensor:
        """M-RoPE's factors [T, D/2], complex, of positions [3, T]."""
        return self.family.rotation(self.model, positions)


def load_model(path: Path, *, device: str = "auto", dtype: str = "auto") -> QwenVL:
    """Loads a checkpoint with its processor; see `open_model`.

    Raises:
        LopError: the folder holds no checkpoint that LOP takes, or a damaged one, or no processor.
    """
    processor = load_processor(path)  # First, as it is the sooner found missing.
    return QwenVL(open_model(path, device=device, dtype=dtype), processor)


def load_processor(path: Path) -> Any:
    """A checkpoint's tokenizer, image processor and chat template.

    Raises:
        LopError: one of them is missing or damaged.
    """
    from transformers import AutoProcessor

    # Without a vocabulary transformers makes do with an empty one.
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise LopError(f"{path} has no tokenizer: copy the model's own tokenizer.json and tokenizer_config.json there")
    with told_in_one_line(path):
        processor = AutoProcessor.from_pretrained(path)
        image_token = read_json(path / "config.json").get("image_token_id", processor.image_token_id)
    if processor.image_token_id != image_token:
        raise LopError(
            f"{path}: the tokenizer's image token is {processor.image_token_id}, the model's {image_token}: "
            "copy the model's own tokenizer there"
        )
    if not processor.chat_template:
        raise LopError(
            f"{path} has no chat template: copy the model's own chat_template.jinja or chat_template.json there"
        )
    return processor


def open_model(path: Path, *, device: str = "auto", dtype: str = "auto") -> Any:
    """Loads a checkpoint, dense or pruned by LOP, ready for inference.

    Args:
        device: `auto` (the first GPU if there is one), or what torch calls it.
        dtype: `auto` (see `place_and_dtype`), or what torch calls it.

    Raises:
        LopError: the folder holds no checkpoint that LOP takes, or a damaged one.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_checkpoint(path, quantised=True)
    place, kind = place_and_dtype(device, dtype, path)
    if is_quantised(path):
        check_library()
    with told_in_one_line(path):
        network_class = family_of(path).network_class()
        model, loading = network_class.from_pretrained(path, dtype=kind, output_loading_info=True)
        if loading["missing_keys"]:
            raise ValueError(f"it lacks {min(loading['missing_keys'])}")
        return model.to(place).eval().requires_grad_(False)


def place_and_dtype(device: str, dtype: str, path: Path) -> tuple[torch.device, torch.dtype]:
    """What `auto` stands for with a checkpoint.

    The device is the first GPU if there is one. The dtype is bfloat16 on a GPU; on a CPU, too, if it has instructions
    for products in bfloat16, and the checkpoint's weights are stored so and are large enough for that to matter; else
    float32.

    Raises:
        LopError: torch knows no such device, or this machine has none.
    """
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError) as error:  # The latter where torch was built without GPUs.
        raise LopError(f"device {device!r} is not to be had: {first_line(error)}; name auto, cpu or cuda:0") from None
    if dtype == "auto":
        gains = place.type == "cuda" or (_multiplies_bfloat16() and _is_large_bfloat16(path))
        dtype = "bfloat16" if gains else "float32"
    return place, getattr(torch, dtype)


def _multiplies_bfloat16() -> bool:
    # Older PyTorch does not say; float32 is right on every CPU.
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _is_large_bfloat16(path: Path) -> bool:
    """Whether a checkpoint's FFNs are stored in bfloat16, and wide enough: of `tiny`, products are a small part."""
    ffns = [info for name, info in read_weights(path).items() if ffn_part(name)]
    return all(info.dtype == "BF16" and min(info.shape) >= _LEAST_WIDTH for info in ffns)


@contextmanager
def told_in_one_line(path: Path) -> Iterator[None]:
    """Turns what loaders raise for a folder that is no such checkpoint into one clear line.

    Raises:
        LopError: the block failed.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
        raise LopError(f"{path} cannot be loaded as a checkpoint: {first_line(error)}") from error
