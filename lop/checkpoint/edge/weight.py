"""What a model weighs as GGUF at any widths, told from the dense checkpoint's headers."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lop.checkpoint.edge.keys import check_family, has_tower, is_left_out
from lop.checkpoint.edge.types import kind_of, stored_bytes
from lop.model.families.registry import FAMILIES
from lop.model.tensors import down_projections
from lop.storage.files import read_json
from lop.storage.headers import read_tensors


@dataclass(frozen=True)
class GgufWeight:
    """What a model weighs in a kind, at any widths.

    Attributes:
        parameters, bytes: of all tensors but the FFNs' weights.
        hidden: the width of the layers' states.
    """

    kind: str
    parameters: int
    bytes: int
    hidden: int

    def ffn_parameters(self, width: int) -> int:
        """Of one layer's FFN as wide as this."""
        return 3 * width * self.hidden

    def ffn_bytes(self, width: int) -> int:
        """The same in bytes."""
        shapes = {"gate_proj.weight": (width, self.hidden), "down_proj.weight": (self.hidden, width)}
        gate, down = (
            stored_bytes(kind_of(name, shape, self.kind, is_tower=False), shape) for name, shape in shapes.items()
        )
        return 2 * gate + down


@lru_cache(maxsize=32)
def weigh(source: Path, kind: str) -> GgufWeight:
    """Sums up a dense checkpoint by its headers.

    Args:
        source: its folder.
        kind: a key of `KINDS`.

    Raises:
        LopError: it is no Qwen2.5-VL.
    """
    config, tensors = read_json(source / "config.json"), read_tensors(source)
    family = FAMILIES[config["model_type"]]
    check_family(source, family)
    hidden = down_projections(tensors)[0][1].shape[0]
    parameters = size = 0
    for name, info in tensors.items():
        is_tower = family.is_tower(name)
        if family.ffn_tensor(name) or is_left_out(name, config) or (is_tower and not has_tower(config)):
            continue
        parameters += info.parameters
        size += stored_bytes(kind_of(name, info.shape, kind, is_tower=is_tower), info.shape)
    return GgufWeight(kind, parameters, size, hidden)
