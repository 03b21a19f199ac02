"""How GGUF stores weights: its types, and which tensor gets which.

Which type a tensor gets follows llama.cpp: vectors stay in float32, a row that does not divide into a type's blocks is
stored as float16, and embeddings and head, which 4 bits cost most, get 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import Any

from lop.errors import LopError

_INSTALL = "pip install 'gguf>=0.19', or pip install -e '.[gguf]'"
_FALLBACK = "f16"
_AROUND = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Kind:
    """One of GGUF's types.

    Attributes:
        block: weights of a row that share a scale; 1 where each stands for itself.
        block_bytes: that they take.
        file_type: llama.cpp's number for files that are mostly of it.
        around: the kind of the embeddings and the head in such a file.
    """

    block: int
    block_bytes: int
    file_type: int
    around: str


KINDS = {
    "f32": Kind(1, 4, 0, "f32"),
    "f16": Kind(1, 2, 1, "f16"),
    "q8_0": Kind(32, 34, 7, "q8_0"),
    "q4_1": Kind(32, 20, 3, "q8_0"),
    "q4_0": Kind(32, 18, 2, "q8_0"),
}


def check_library() -> None:
    """Looks before anything is done for nothing.

    Raises:
        LopError: what writes GGUF is not installed; names the `pip install`.
    """
    if find_spec("gguf") is None:
        raise LopError(f"GGUF is written by a package that is not installed: {_INSTALL}")


def kind_of(name: str, shape: Sequence[int], kind: str, *, is_tower: bool) -> str:
    """The type of one tensor in a file of a kind.

    Args:
        name: as the checkpoint has it.
        shape: as it is stored, the tower's patch embedding with its five axes.
        is_tower: the vision tower's stay in float16 whatever the language model's are.
    """
    if len(shape) < 2:
        return "f32"
    if is_tower:
        return _FALLBACK
    wanted = KINDS[kind].around if name.endswith(_AROUND) else kind
    return wanted if shape[-1] % KINDS[wanted].block == 0 else _FALLBACK


def stored_bytes(kind: str, shape: Sequence[int]) -> int:
    """What a tensor takes in a kind; its last axis divides into blocks."""
    return prod(shape) // KINDS[kind].block * KINDS[kind].block_bytes


def ggml(kind: str) -> Any:
    """The library's name for a kind."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind.upper()]
