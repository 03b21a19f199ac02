"""Qwen2-VL."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lop.model.families.qwen import Qwen


@dataclass(frozen=True)
class _Qwen2VL(Qwen):
    """Its tower's blocks look at whole images, all of them."""

    tower_sizes: ClassVar[Mapping[str, Any]] = {"embed_dim": 1280, "mlp_ratio": 4}

    def whole_attention(self, vision_config: Any) -> int:
        return vision_config.embed_dim * vision_config.depth

    def tower_widths(self, vision: Mapping[str, Any]) -> tuple[int, int, int]:
        return vision["embed_dim"], int(vision["embed_dim"] * vision["mlp_ratio"]), 2


FAMILY = _Qwen2VL(
    model_type="qwen2_vl",
    name="Qwen2-VL",
    architecture="Qwen2VLForConditionalGeneration",
    modeling="lop.model.families.remote_qwen2_vl",
    in_vllm=False,
)
