"""What LOP has to be told of a family of models. The rest of LOP asks here, and knows no family's names."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from lop.model.backbone import Backbone, Layer


class Family(Protocol):
    """All that is true of one family alone.

    It holds no model. What is done with one is given its `network`, which is what transformers builds, or its
    `processor`.
    """

    # What its checkpoints are.

    @property
    def model_type(self) -> str:
        """What configs call it."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def architecture(self) -> str:
        """transformers' class of the whole model."""

    @property
    def pruned_class(self) -> str:
        """The class in `modeling`: the same whole model with a width of its own for each layer."""

    @property
    def modeling(self) -> str:
        """The module whose file exported checkpoints carry; it imports nothing of LOP."""

    @property
    def in_vllm(self) -> bool:
        """Whether LOP's plugin tells vLLM of `pruned_class`."""

    def refusal(self, config: Mapping[str, Any]) -> str | None:
        """Why LOP cannot compute a model of the family with this config; None if it can."""

    def text_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What of a checkpoint's config is the language backbone's, however old the config is."""

    def vision_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What of a checkpoint's config is the vision tower's; what it leaves out is as transformers has it."""

    def tower_widths(self, vision: Mapping[str, Any]) -> tuple[int, int, int]:
        """Of the vision tower's blocks by its config: their width, their FFN's, and the tensors as wide as the latter
        that it holds at once.
        """

    # How they name their tensors, now and formerly. No name means two things in two families.

    def ffn_tensor(self, name: str) -> tuple[int, str] | None:
        """Of an FFN weight of the language backbone its layer and which it is: `gate_proj`, `up_proj`, `down_proj`."""

    def attention_tensor(self, name: str) -> tuple[int, str, str] | None:
        """Of an attention tensor of the language backbone its layer, which projection it is (`q_proj`, `k_proj`,
        `v_proj`, `o_proj`), and whether its `weight` or its `bias`."""

    def tower_block(self, name: str) -> int | None:
        """The block of the vision tower that a tensor belongs to."""

    def is_tower(self, name: str) -> bool:
        """Whether a tensor is the vision tower's."""

    def parameter(self, name: str) -> str:
        """What a network calls the parameter that a tensor is of."""

    # Where a network has its parts: names of submodules.

    @property
    def tower(self) -> str:
        """The vision tower."""

    @property
    def backbone(self) -> str:
        """The language model without its head, `inputs_embeds` [B, T, H] to hidden states [B, T, H]; has `layers`."""

    @property
    def head(self) -> str:
        """Hidden states [N, H] to logits [N, V]."""

    @property
    def ffn(self) -> str:
        """Within a layer of the backbone the FFN, which has `gate_proj`, `up_proj` and `down_proj`."""

    @property
    def attention(self) -> str:
        """Within a layer of the backbone the attention."""

    @property
    def resident(self) -> tuple[str, ...]:
        """What has to be in memory where the layers come from disk one at a time: what encoding takes, and the norm."""

    def network_class(self) -> Any:
        """`pruned_class` itself. A dense config changes nothing in it."""

    def keep_groups(self, layer: Any, groups: int) -> None:
        """Leaves a layer of a network's backbone the first groups of its attention's heads, over the same weights.

        Its attention's modules stay, but for one that keeps none: something that adds nothing takes its place.
        """

    # What a network's language backbone computes.

    def lean_layer(self, network: Any, index: int) -> "Layer":
        """One decoder layer as `lop.model.backbone` runs it: the network's norms and FFN, a copy of its projections."""

    def lean_backbone(self, network: Any) -> "Backbone":
        """All layers with the norm and the head."""

    def positions(self, network: Any, ids: "Tensor", token_types: "Tensor", grid: "Tensor | None") -> "Tensor":
        """The positions [3, T] of one sequence.

        Args:
            ids: [T], the tokens.
            token_types: [T], 1 where an image's tokens are, else 0.
            grid: [1, 3], the image's patches in time, height and width; None without an image.
        """

    def rotation(self, network: Any, positions: "Tensor") -> "Tensor":
        """The factors [T, D/2], complex, by which positions [3, T] turn queries and keys."""

    # How images are read.

    def least_pixels(self, processor: Any) -> int:
        """The fewest pixels that the processor can be told to make of any image."""

    def patches(self, processor: Any, height: int, width: int, max_pixels: int | None) -> int:
        """Into how many patches the processor cuts an image of so many pixels."""

    def patches_per_token(self, processor: Any) -> int:
        """How many patches become one token of the backbone."""

    def pixels(self, processor: Any, images: "Sequence[Image]", max_pixels: int | None) -> "tuple[Tensor, Tensor]":
        """The patches of all images [patches, …], and each image's grid [images, 3].

        Args:
            max_pixels: the most pixels that are left of an image; as the processor says by default.
        """

    def image_features(self, network: Any, pixels: "Tensor", grids: "Tensor") -> "tuple[Tensor, ...]":
        """Each image's embeddings [tokens, H], from the vision tower."""

    def sliced(self, tower: Any, most: int) -> AbstractContextManager[None]:
        """Has a vision tower work on at most so many patches at a time inside the block."""

    def whole_attention(self, vision_config: Any) -> int:
        """The tower's width, times its blocks in which each patch looks at all others of an image."""
