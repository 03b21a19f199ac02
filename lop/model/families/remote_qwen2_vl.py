"""Qwen2-VL whose FFNs have a width of their own in each layer.

Exported checkpoints carry a copy of this file, so it imports nothing of LOP, and it works in any transformers that
knows Qwen2-VL: the widths stand in `text_config.per_layer_config`, which transformers 5 understands itself and
earlier ones keep as the plain dictionary that it is.
"""

from typing import Any

from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration


class LopQwen2VLForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """The ordinary model with each FFN built as wide as its layer's config says; a dense config changes nothing."""

    config: Qwen2VLConfig

    def __init__(self, config: Qwen2VLConfig) -> None:
        # transformers builds equal layers and refuses to read a width that differs between them: it gets to see the
        # config without the widths. It must be this very config, not a copy: all modules keep it, and what is set
        # later, such as the attention implementation, is set there for all of them.
        _unnest(config)
        text = _text(config)
        layers = text.to_dict().get("per_layer_config")
        if layers:
            text.per_layer_config = None
        try:
            super().__init__(config)
        finally:
            if layers:
                text.per_layer_config = layers
        backbone: Any = getattr(self.model, "language_model", self.model)
        if layers and backbone.config is not text:  # transformers before 5 gives the backbone a copy.
            backbone.config.per_layer_config = layers
        widths = {int(layer): entry["intermediate_size"] for layer, entry in (layers or {}).items()}
        has_bias = getattr(text, "down_proj_bias", False)
        for layer, module in enumerate(backbone.layers):
            width = widths.get(layer, module.mlp.intermediate_size)
            if width != module.mlp.intermediate_size or has_bias:
                _resize(module.mlp, width, bias=has_bias)
        # Start values for what is new here; all else has its own already.
        self.init_weights()


def _resize(ffn: Any, width: int, *, bias: bool) -> None:
    """Gives an FFN new projections of a width, in the type and place of those it has."""
    like = {"device": ffn.down_proj.weight.device, "dtype": ffn.down_proj.weight.dtype}
    ffn.intermediate_size = width
    ffn.gate_proj = nn.Linear(ffn.hidden_size, width, bias=False, **like)
    ffn.up_proj = nn.Linear(ffn.hidden_size, width, bias=False, **like)
    ffn.down_proj = nn.Linear(width, ffn.hidden_size, bias=bias, **like)


def _unnest(config: Qwen2VLConfig) -> None:
    """Where the flat config is the language backbone's, puts there what the file has in a `text_config` beside it.

    transformers up to 4.51 keeps the latter as a plain dictionary, and then takes it for a config object.
    """
    nested = getattr(config, "text_config", None)
    if isinstance(nested, dict):
        for name in {"per_layer_config", "down_proj_bias"} & nested.keys():
            setattr(config, name, nested[name])
        del config.text_config


def _text(config: Qwen2VLConfig):  # type: ignore[no-untyped-def]
    """The language backbone's config."""
    return getattr(config, "text_config", None) or config


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
        LopQwen2VLForConditionalGeneration.__name__,
        get_checkpoint_conversion_mapping(Qwen2VLForConditionalGeneration.__name__),
        overwrite=True,
    )

# So that `save_pretrained` writes a copy of this file and an `auto_map` that names it.
LopQwen2VLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
