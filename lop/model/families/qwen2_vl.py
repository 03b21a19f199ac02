"""Qwen2-VL."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lop.model.families.qwen import Qwen


@dataclass(frozen=True)
class _Qwen2VL(Qwen):
    """Its tower's blocks look at whole images, all of them."""

    def whole_attention(self, vision_config: Any) -> int:
        return vision_config.embed_dim * vision_config.depth

    def tower_widths(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        vision = config["vision_config"]
        hidden = vision.get("embed_dim", 1280)
        return hidden, int(hidden * vision.get("mlp_ratio", 4)), 2


FAMILY = _Qwen2VL(
    model_type="qwen2_vl",
    name="Qwen2-VL",
    architecture="Qwen2VLForConditionalGeneration",
    modeling="lop.model.families.remote_qwen2_vl",
    in_vllm=False,
)
