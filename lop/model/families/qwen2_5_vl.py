"""Qwen2.5-VL."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lop.model.families.qwen import Qwen


@dataclass(frozen=True)
class _Qwen25VL(Qwen):
    """Its tower looks at windows, but in a few blocks."""

    tower_sizes: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 3584, "intermediate_size": 3420, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]
    }  # fmt: skip

    def whole_attention(self, vision_config: Any) -> int:
        return vision_config.hidden_size * len(vision_config.fullatt_block_indexes)

    def tower_widths(self, vision: Mapping[str, Any]) -> tuple[int, int, int]:
        return vision["hidden_size"], vision["intermediate_size"], 3


FAMILY = _Qwen25VL(
    model_type="qwen2_5_vl",
    name="Qwen2.5-VL",
    architecture="Qwen2_5_VLForConditionalGeneration",
    modeling="lop.model.families.remote_qwen2_5_vl",
    in_vllm=True,
)
