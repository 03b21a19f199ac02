"""Qwen2-VL."""

from dataclasses import dataclass
from typing import Any

from lop.model.families.qwen import Qwen


@dataclass(frozen=True)
class _Qwen2VL(Qwen):
    """Its tower's blocks look at whole images, all of them."""

    def whole_attention(self, vision_config: Any) -> int:
        return vision_config.embed_dim * vision_config.depth


FAMILY = _Qwen2VL(
    model_type="qwen2_vl",
    name="Qwen2-VL",
    architecture="Qwen2VLForConditionalGeneration",
    modeling="lop.model.families.remote_qwen2_vl",
    in_vllm=False,
)
