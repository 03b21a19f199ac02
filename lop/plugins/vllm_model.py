"""Qwen2.5-VL with a width of its own for each layer, in vLLM: serves `hf` checkpoints without any padding.

Only vLLM imports this file. It builds each layer from `text_config.per_layer_config`; everything else, weight loading,
tensor parallelism and multi-modal processing included, is vLLM's own.
"""

from typing import Any
from unittest.mock import patch

from torch import nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models import qwen2_5_vl
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.utils import PPMissingLayer, extract_layer_index, maybe_prefix


class LopQwen2DecoderLayer(Qwen2DecoderLayer):
    """vLLM's layer, built from the config of this very layer."""

    def __init__(
        self,
        config: Any,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        if getattr(config, "down_proj_bias", False):
            raise ValueError("vLLM's FFN has no bias: export this checkpoint with --recovery refit or none")
        if "num_key_value_heads" in (getattr(config, "per_layer_attributes", None) or ()):
            raise ValueError("vLLM wants as many heads in all layers: export this checkpoint with --format padded")
        super().__init__(config.per_layer_config[extract_layer_index(prefix)], cache_config, quant_config, prefix)


class LopQwen2ForCausalLM(Qwen2ForCausalLM):
    """vLLM's language model with `LopQwen2DecoderLayer`; vLLM's own constructor has no place to say so."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config.get_text_config()
        self.config = config
        self.quant_config = vllm_config.quant_config
        self.model = Qwen2Model(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            decoder_layer_type=LopQwen2DecoderLayer,
        )
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors


class LopQwen2_5_VLForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """vLLM's model with `LopQwen2ForCausalLM` in it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        build = qwen2_5_vl.init_vllm_registered_model

        def uneven(*, architectures: list[str], **arguments: object) -> nn.Module:
            return build(architectures=["LopQwen2ForCausalLM"], **arguments)

        # The language model's architecture is a constant within vLLM's constructor.
        with patch.object(qwen2_5_vl, "init_vllm_registered_model", uneven):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
