"""Qwen2.5-VL whose FFNs have a width of their own in each layer.

Exported checkpoints carry a copy of this file, so it imports nothing of LOP, and it works in any transformers that
knows Qwen2.5-VL: the widths stand in `text_config.per_layer_config`, which transformers 5 understands itself and
earlier ones keep as the plain dictionary that it is.
"""

import copy
from typing import Any

from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2MLP


class LopQwen2_5_VLForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """The ordinary model with each FFN built as wide as its layer's config says; a dense config changes nothing."""

    config: Qwen2_5_VLConfig

    def __init__(self, config: Qwen2_5_VLConfig) -> None:
        # transformers builds equal layers and refuses to read a width that differs between them,
        # so build the equal model first, then put the true FFNs in place, before any weight is loaded.
        _unnest(config)
        plain = copy.deepcopy(config)
        text = _text(plain)
        widths, has_bias = _widths(text), getattr(text, "down_proj_bias", False)
        text.per_layer_config = None
        super().__init__(plain)
        backbone: Any = getattr(self.model, "language_model", self.model)
        ffn_config = copy.deepcopy(backbone.config)
        for layer, module in enumerate(backbone.layers):
            if widths.get(layer, module.mlp.intermediate_size) != module.mlp.intermediate_size:
                ffn_config.intermediate_size = widths[layer]
                module.mlp = Qwen2MLP(ffn_config)
            if has_bias:
                module.mlp.down_proj = nn.Linear(module.mlp.intermediate_size, ffn_config.hidden_size, bias=True)
        # Chosen on the copy. Without it attention runs, but with no mask: batches with padding come out wrong.
        config._attn_implementation = plain._attn_implementation
        self.config = self.model.config = config
        if backbone is not self.model:
            backbone.config = config.text_config


def _unnest(config: Qwen2_5_VLConfig) -> None:
    """Where the flat config is the language backbone's, puts there what the file has in a `text_config` beside it.

    transformers up to 4.51 keeps the latter as a plain dictionary, and then takes it for a config object.
    """
    nested = getattr(config, "text_config", None)
    if isinstance(nested, dict):
        for name in {"per_layer_config", "down_proj_bias"} & nested.keys():
            setattr(config, name, nested[name])
        del config.text_config


def _text(config: Qwen2_5_VLConfig):  # type: ignore[no-untyped-def]
    """The language backbone's config."""
    return getattr(config, "text_config", None) or config


def _widths(text) -> dict[int, int]:  # type: ignore[no-untyped-def]
    """The width of each layer that has one of its own."""
    layers = getattr(text, "per_layer_config", None) or {}
    if isinstance(layers, dict):
        return {int(layer): entry["intermediate_size"] for layer, entry in layers.items()}
    return {layer: entry.intermediate_size for layer, entry in enumerate(layers)}


try:
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
except ImportError:
    pass  # Before transformers 5 the class itself says how its checkpoints' tensors are named, and is inherited from.
else:
    # Checkpoints name their tensors as the first Qwen2-VL did. transformers translates by the class's name, and for
    # classes that are not its own only if told so.
    register_checkpoint_conversion_mapping(
        LopQwen2_5_VLForConditionalGeneration.__name__,
        get_checkpoint_conversion_mapping(Qwen2_5_VLForConditionalGeneration.__name__),
        overwrite=True,
    )

# So that `save_pretrained` writes a copy of this file and an `auto_map` that names it.
LopQwen2_5_VLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
