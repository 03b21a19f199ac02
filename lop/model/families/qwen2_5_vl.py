"""Qwen2.5-VL."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lop.model.families.qwen import Qwen


@dataclass(frozen=True)
class _Qwen25VL(Qwen):
    """Its tower looks at windows, but in a few blocks."""

    def whole_attention(self, vision_config: Any) -> int:
        return vision_config.hidden_size * len(vision_config.fullatt_block_indexes)

    def tower_widths(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        vision = config["vision_config"]
        return vision.get("hidden_size", 3584), vision.get("intermediate_size", 3420), 3


FAMILY = _Qwen25VL(
    model_type="qwen2_5_vl",
    name="Qwen2.5-VL",
    architecture="Qwen2_5_VLForConditionalGeneration",
    modeling="lop.model.families.remote_qwen2_5_vl",
    in_vllm=True,
)
