"""What GGUF files say of their models, in llama.cpp's keys; and which vision towers its graph can compute."""

from collections.abc import Mapping, Sequence
from typing import Any

from lop.checkpoint.edge.types import KINDS
from lop.errors import LopError
from lop.model.families.family import Family
from lop.model.families.registry import FAMILIES

_FAMILY = "qwen2_5_vl"
# By which llama.cpp makes up its buffers, before it has seen an image; no image has to have it.
_IMAGE_SIZE = 560
_TOWER_EPSILON = 1e-6
_WINDOW = 112


def add_language(writer: Any, text: Mapping[str, Any], widths: Sequence[int], kind: str) -> None:
    """Writes the language model's sizes.

    Args:
        writer: gguf's.
        text: the config of the language model.
        widths: [L] neurons of each layer in the file; alike, they are written as the one number that stock llama.cpp
            reads, else as an array.
        kind: a key of `KINDS`.

    Raises:
        LopError: positions are turned in a way that is not Qwen2.5-VL's.
    """
    rope = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta"), **(text.get("rope_scaling") or {})}
    if (how := rope.get("rope_type", rope.get("type"))) not in ("default", "mrope", None):
        raise LopError(f"positions are scaled by {how!r} (rope_parameters), which LOP does not write as GGUF")
    sections = list(rope["mrope_section"])
    writer.add_type("model")
    writer.add_block_count(len(widths))
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(widths[0] if len(set(widths)) == 1 else list(widths))
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_sections(sections + [0] * (4 - len(sections)))
    writer.add_file_type(KINDS[kind].file_type)
    if KINDS[kind].block > 1:
        from gguf import GGML_QUANT_VERSION

        writer.add_quantization_version(GGML_QUANT_VERSION)


def add_tower(writer: Any, vision: Mapping[str, Any], hidden: int, processor: Mapping[str, Any]) -> None:
    """Writes the vision tower's sizes.

    Args:
        vision: its config, with all that a config may leave out.
        hidden: the width of the language model's states.
        processor: what of the processor's config is of images.
    """
    from gguf import VisionProjectorType

    writer.add_type("mmproj")
    writer.add_file_type(KINDS["f16"].file_type)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(VisionProjectorType.QWEN25VL)
    writer.add_vision_projection_dim(hidden)
    writer.add_vision_image_size(_IMAGE_SIZE)
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision["depth"])
    writer.add_vision_head_count(vision["num_heads"])
    writer.add_vision_attention_layernorm_eps(_TOWER_EPSILON)
    writer.add_vision_image_mean(list(processor["image_mean"]))
    writer.add_vision_image_std(list(processor["image_std"]))
    writer.add_vision_use_silu(True)
    writer.add_vision_n_wa_pattern(vision["fullatt_block_indexes"][0] + 1)


def tower_refusal(vision: Mapping[str, Any]) -> str | None:
    """Why llama.cpp's graph of Qwen2.5-VL's tower cannot compute one with this config; None if it can."""
    if (merged := vision["spatial_merge_size"]) != 2:
        return f"its vision tower merges {merged} × {merged} patches into a token, and llama.cpp's graph 2 × 2"
    if vision["temporal_patch_size"] != 2:
        return f"its patches span {vision['temporal_patch_size']} frames, and those of llama.cpp 2"
    full = list(vision["fullatt_block_indexes"])
    every = full[0] + 1 if full else 0
    if not every or full != list(range(every - 1, vision["depth"], every)):
        return f"its blocks that look at all patches are {full}, and llama.cpp's every so many from the first on"
    if every > 1 and vision["window_size"] != _WINDOW:
        return f"its windows are {vision['window_size']} pixels wide, and llama.cpp's {_WINDOW}"
    return None


def check_family(source: Any, family: Family) -> None:
    """Refuses a model whose tensors and keys are written nowhere here.

    Raises:
        LopError: it is no Qwen2.5-VL.
    """
    if family.model_type != _FAMILY:
        raise LopError(f"{source} is a {family.name}, and LOP writes GGUF of {FAMILIES[_FAMILY].name} alone")


def has_tower(config: Mapping[str, Any]) -> bool:
    """Whether there is a file for the vision tower of a model with this config."""
    return tower_refusal(FAMILIES[config["model_type"]].vision_config(config)) is None


def is_left_out(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is there once more: a head that is the embeddings."""
    text = FAMILIES[config["model_type"]].text_config(config)
    is_tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    return bool(is_tied) and name.startswith("lm_head.")
