"""What Qwen2-VL and Qwen2.5-VL have in common: all but the vision tower's blocks."""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from lop.model.backbone import Backbone, Layer

_FFN_WEIGHT = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight$")
_ATTENTION = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.([qkvo]_proj)\.(weight|bias)$")
_TOWER_BLOCK = re.compile(r"visual\.blocks\.(\d+)\.")
# Of a config as the first checkpoints have it, flat: what is not the language backbone's, or is of the whole, too.
_NOT_TEXT = {"architectures", "auto_map", "model_type", "transformers_version", "vision_config"}
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# transformers up to 4.51 leaves out of a config what is as its default.
_TOWER = {
    "depth": 32, "num_heads": 16, "in_channels": 3, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Qwen:
    """What each says of itself; see `lop.model.families.family.Family`."""

    model_type: str
    name: str
    architecture: str
    modeling: str
    in_vllm: bool

    tower_sizes: ClassVar[Mapping[str, Any]]  # Defaults of its vision config, beside those that are of both.
    tower: ClassVar[str] = "model.visual"
    backbone: ClassVar[str] = "model.language_model"
    head: ClassVar[str] = "lm_head"
    ffn: ClassVar[str] = "mlp"
    attention: ClassVar[str] = "self_attn"
    resident: ClassVar[tuple[str, ...]] = (
        tower,
        f"{backbone}.embed_tokens",
        f"{backbone}.norm",
        f"{backbone}.rotary_emb",
    )

    @property
    def pruned_class(self) -> str:
        return f"Lop{self.architecture}"

    def refusal(self, config: Mapping[str, Any]) -> str | None:
        text = self.text_config(config)
        if text.get("hidden_act", "silu") != "silu":
            return f"its activation is {text['hidden_act']!r} (hidden_act), where {self.name} has 'silu'"
        if text.get("use_sliding_window"):
            return "its attention has a sliding window (use_sliding_window), which LOP does not compute"
        return None

    def text_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config.get("text_config"):
            return dict(config["text_config"])
        flat = {key: value for key, value in config.items() if key not in _NOT_TEXT and not key.endswith("_token_id")}
        ends = {key: config[key] for key in _ENDS if key in config}
        return {**flat, **ends, "model_type": f"{self.model_type}_text"}

    def vision_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        said = {key: value for key, value in (config.get("vision_config") or {}).items() if value is not None}
        return {**_TOWER, **self.tower_sizes, **said}

    def ffn_tensor(self, name: str) -> tuple[int, str] | None:
        found = _FFN_WEIGHT.search(name)
        return (int(found.group(1)), found.group(2)) if found and not self.is_tower(name) else None

    def attention_tensor(self, name: str) -> tuple[int, str, str] | None:
        found = _ATTENTION.search(name)
        return (int(found.group(1)), found.group(2), found.group(3)) if found and not self.is_tower(name) else None

    def tower_block(self, name: str) -> int | None:
        found = _TOWER_BLOCK.search(name)
        return int(found.group(1)) if found else None

    def is_tower(self, name: str) -> bool:
        return "visual." in name

    def parameter(self, name: str) -> str:
        # As transformers 5 names them, but for the head; there are two older schemes.
        name = name.removeprefix("model.")
        if name.startswith("lm_head."):
            return name
        return f"model.{name}" if name.startswith(("visual.", "language_model.")) else f"{self.backbone}.{name}"

    def network_class(self) -> Any:
        return getattr(import_module(self.modeling), self.pruned_class)

    def keep_groups(self, layer: Any, groups: int) -> None:
        from lop.model.families.groups import keep_groups

        keep_groups(layer.self_attn, groups)
        if not groups:
            layer.self_attn = import_module(self.modeling).Silent(layer.self_attn)

    def lean_layer(self, network: Any, index: int) -> "Layer":
        from lop.model.families.lean import lean_layer

        return lean_layer(network.get_submodule(self.backbone).layers[index])

    def lean_backbone(self, network: Any) -> "Backbone":
        from lop.model.backbone import Backbone

        config, backbone = network.config.text_config, network.get_submodule(self.backbone)
        return Backbone(
            layers=tuple(self.lean_layer(network, index) for index in range(len(backbone.layers))),
            norm=backbone.norm.weight,
            head=network.get_submodule(self.head).weight,
            epsilon=config.rms_norm_eps,
        )

    def positions(self, network: Any, ids: "Tensor", token_types: "Tensor", grid: "Tensor | None") -> "Tensor":
        positions, _ = network.model.get_rope_index(ids[None], token_types[None], image_grid_thw=grid)
        return positions[:, 0]

    def rotation(self, network: Any, positions: "Tensor") -> "Tensor":
        from lop.model.families.lean import rotation

        return rotation(network.get_submodule(self.backbone).rotary_emb, positions)

    def least_pixels(self, processor: Any) -> int:
        return processor.image_processor.size["shortest_edge"]

    def patches(self, processor: Any, height: int, width: int, max_pixels: int | None) -> int:
        limits = {} if max_pixels is None else {"max_pixels": max_pixels}
        return processor.image_processor.get_number_of_image_patches(height, width, limits)

    def patches_per_token(self, processor: Any) -> int:
        return processor.image_processor.merge_size**2

    def pixels(self, processor: Any, images: "Sequence[Image]", max_pixels: int | None) -> "tuple[Tensor, Tensor]":
        image_processor = processor.image_processor
        size = {name: image_processor.size[name] for name in ("shortest_edge", "longest_edge")}
        if max_pixels is not None:
            size["longest_edge"] = max_pixels
        inputs = image_processor(images=list(images), size=size, return_tensors="pt")
        return inputs["pixel_values"], inputs["image_grid_thw"]

    def image_features(self, network: Any, pixels: "Tensor", grids: "Tensor") -> "tuple[Tensor, ...]":
        return network.model.get_image_features(pixels, grids, return_dict=True).pooler_output

    def sliced(self, tower: Any, most: int) -> AbstractContextManager[None]:
        from lop.model.families.slices import sliced

        return sliced(tower, most)
