"""Qwen2-VL whose FFNs and attention have a width of their own in each layer.

Exported checkpoints carry a copy of this file, so it imports nothing of LOP, and it works in any transformers that
knows Qwen2-VL: the widths stand in `text_config.per_layer_config`, which transformers 5 understands itself and
earlier ones keep as the plain dictionary that it is.
"""

from typing import Any

import torch
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration


class LopQwen2VLForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """The ordinary model with each layer built as wide as its own config says; a dense config changes nothing."""

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
        entries = {int(layer): entry for layer, entry in (layers or {}).items()}
        has_bias = getattr(text, "down_proj_bias", False)
        for layer, module in enumerate(backbone.layers):
            ffn, attention, entry = module.mlp, module.self_attn, entries.get(layer, {})
            width = entry.get("intermediate_size", ffn.intermediate_size)
            if width != ffn.intermediate_size or has_bias:
                _resize(ffn, width, bias=has_bias)
            groups = entry.get("num_key_value_heads", attention.num_key_value_heads)
            if groups != attention.num_key_value_heads:
                _regroup(attention, groups)
                if not groups:
                    module.self_attn = Silent(attention)
        # Start values for what is new here; all else has its own already.
        self.init_weights()


def _resize(ffn: Any, width: int, *, bias: bool) -> None:
    """Gives an FFN new projections of a width, in the type and place of those it has."""
    like = {"device": ffn.down_proj.weight.device, "dtype": ffn.down_proj.weight.dtype}
    ffn.intermediate_size = width
    ffn.gate_proj = nn.Linear(ffn.hidden_size, width, bias=False, **like)
    ffn.up_proj = nn.Linear(ffn.hidden_size, width, bias=False, **like)
    ffn.down_proj = nn.Linear(width, ffn.hidden_size, bias=bias, **like)


def _regroup(attention: Any, groups: int) -> None:
    """Gives an attention new projections of some of its groups: key and value heads, with their query heads."""
    like = {"device": attention.o_proj.weight.device, "dtype": attention.o_proj.weight.dtype}
    hidden, queries = attention.o_proj.out_features, groups * attention.num_key_value_groups
    attention.num_heads, attention.num_key_value_heads = queries, groups
    attention.q_proj = nn.Linear(hidden, queries * attention.head_dim, bias=True, **like)
    attention.k_proj = nn.Linear(hidden, groups * attention.head_dim, bias=True, **like)
    attention.v_proj = nn.Linear(hidden, groups * attention.head_dim, bias=True, **like)
    attention.o_proj = nn.Linear(queries * attention.head_dim, hidden, bias=False, **like)


class Silent(nn.Module):
    """An attention without heads: adds nothing. Its empty projections are those of the checkpoint."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.head_dim, self.layer_idx = attention.head_dim, attention.layer_idx
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj

    def forward(self, hidden_states: torch.Tensor, *_: Any, **given: Any) -> tuple[torch.Tensor, None]:
        cache = next((given[name] for name in ("cache", "past_key_values") if given.get(name) is not None), None)
        if cache is not None:
            # The cache is asked how many tokens there are, in this layer as in any other.
            nothing = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(nothing, nothing, self.layer_idx)
        return torch.zeros_like(hidden_states), None


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
