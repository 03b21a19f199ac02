"""Qwen2.5-VL whose FFNs have a width of their own in each layer.

Exported checkpoints carry a copy of this file, so it imports nothing of LOP. The widths stand in the config as
transformers' own `text_config.per_layer_config`.
"""

import copy

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2MLP


class LopQwen2_5_VLForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """The ordinary model with each FFN built as wide as its layer's config says; a dense config changes nothing."""

    config: Qwen2_5_VLConfig

    def __init__(self, config: Qwen2_5_VLConfig) -> None:
        layers = list(config.text_config.per_layer_config)
        # transformers builds equal layers and refuses to read a width that differs between them,
        # so build the equal model first, then put the true FFNs in place, before any weight is loaded.
        plain = copy.deepcopy(config)
        plain.text_config.per_layer_config = None
        super().__init__(plain)
        backbone = self.model.language_model
        for layer, layer_config in zip(backbone.layers, layers, strict=True):
            if layer_config.intermediate_size != plain.text_config.intermediate_size:
                layer.mlp = Qwen2MLP(layer_config)
        # Chosen on the copy. Without it attention runs, but with no mask: batches with padding come out wrong.
        config._attn_implementation = plain._attn_implementation
        self.config = self.model.config = config
        backbone.config = config.text_config


# Checkpoints name their tensors as the first Qwen2-VL did. transformers translates by the class's name, and for classes
# that are not its own only if told so.
register_checkpoint_conversion_mapping(
    LopQwen2_5_VLForConditionalGeneration.__name__,
    get_checkpoint_conversion_mapping(Qwen2_5_VLForConditionalGeneration.__name__),
    overwrite=True,
)
