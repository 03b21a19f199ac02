"""The tensors of GGUF files: which of the checkpoint's each is, under llama.cpp's name, and its values row by row."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from lop.checkpoint.edge.types import ggml, kind_of, stored_bytes
from lop.checkpoint.shards import Cut
from lop.errors import LopError
from lop.model.families.family import Family
from lop.storage.headers import TensorInfo

_STEP = 2**21  # Numbers that are converted at a time.
_DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


@dataclass(frozen=True)
class Piece:
    """A tensor of a GGUF file.

    Attributes:
        name: as llama.cpp knows it.
        cut: the checkpoint's tensor.
        shape: of this one, the slowest axis first.
        kind: a key of `KINDS`.
        first: where its rows begin among the cut's; the tower's queries, keys and values are three pieces of one.
        frame: which of the patch embedding's frames it is; None for all other tensors.
    """

    name: str
    cut: Cut
    shape: tuple[int, ...]
    kind: str
    first: int = 0
    frame: int | None = None

    @property
    def bytes(self) -> int:
        return stored_bytes(self.kind, self.shape)


def language_pieces(cuts: Sequence[tuple[str, Cut]], family: Family, kind: str, layers: int) -> list[Piece]:
    """The language model's tensors.

    Raises:
        LopError: one of them has no place in llama.cpp's graph, which would leave it out without a word.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.QWEN2VL, layers)
    pieces = []
    for name, cut in cuts:
        if family.is_tower(name):
            continue
        if name.endswith("down_proj.bias"):
            raise LopError(
                f"{name}: llama.cpp's qwen2vl has no bias there and would leave it out: choose recovery 'refit'"
            )
        plain = family.parameter(name).replace("model.language_model.", "model.")
        pieces.append(
            Piece(_mapped(names, plain, name), cut, cut.shape, kind_of(name, cut.shape, kind, is_tower=False))
        )
    return pieces


def tower_pieces(cuts: Sequence[tuple[str, Cut]], family: Family, depth: int) -> list[Piece]:
    """The vision tower's tensors: `qkv` in three, and the patch embedding's two frames apart."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, depth)
    pieces = []
    for name, cut in cuts:
        if not family.is_tower(name):
            continue
        plain = family.parameter(name).removeprefix("model.")
        kind = kind_of(name, cut.shape, "f16", is_tower=True)
        if ".qkv." in plain:
            shape = (cut.shape[0] // 3, *cut.shape[1:])
            pieces += [
                Piece(_mapped(names, plain.replace("qkv", part), name), cut, shape, kind, first=index * shape[0])
                for index, part in enumerate("qkv")
            ]
        elif len(cut.shape) == 5:
            shape = cut.shape[:2] + cut.shape[3:]
            known = _mapped(names, plain, name)
            pieces += [
                Piece(f"{known}{suffix}", cut, shape, kind, frame=frame) for frame, suffix in enumerate(("", ".1"))
            ]
        else:
            pieces.append(Piece(_mapped(names, plain, name), cut, cut.shape, kind))
    return pieces


def _mapped(names: Any, plain: str, name: str) -> str:
    found = names.get_name(plain, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise LopError(f"{name}: llama.cpp's qwen2vl has no such tensor, so it cannot be written as GGUF")
    return str(found)


def read_piece(piece: Piece) -> Iterator[np.ndarray]:
    """A piece's bytes, a few rows at a time.

    Raises:
        LopError: a number is too large for the piece's type.
    """
    from gguf import quants

    rows = piece.shape[0]
    step = max(_STEP // max(prod(piece.cut.shape[1:]), 1), 1)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        values = _values(piece.cut, piece.first + start, piece.first + stop)
        if piece.frame is not None:
            values = values.reshape(stop - start, *piece.cut.shape[1:])[:, :, piece.frame]
        values = values.reshape(stop - start, *piece.shape[1:])
        with np.errstate(over="ignore"):
            data = quants.quantize(np.ascontiguousarray(values), ggml(piece.kind))
        if piece.kind == "f16" and not np.isfinite(data).all():
            raise LopError(f"{piece.name} has numbers that float16 does not hold: they cannot be written as GGUF's f16")
        yield data


def _values(cut: Cut, start: int, stop: int) -> np.ndarray:
    """Rows [stop − start, …] of what a cut comes to, in float32."""
    source = _mapped_file(cut.source)
    if cut.rows is not None:
        found = _floats(source[cut.rows[start:stop]])
        missing = stop - start - len(found)
        return np.pad(found, [(0, missing), (0, 0)][: found.ndim]) if missing else found
    found = _floats(source[start:stop])
    if cut.columns is not None:
        found = found[:, cut.columns]
        missing = cut.shape[1] - found.shape[1]
        return np.pad(found, ((0, 0), (0, missing))) if missing else found
    return found


def _mapped_file(info: TensorInfo) -> np.ndarray:
    return np.memmap(info.file, _DTYPES[info.dtype], "r", info.offset, info.shape)


def _floats(stored: np.ndarray) -> np.ndarray:
    """bfloat16, which numpy does not know, is the upper half of a float32."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(stored, np.float32)


def stored_widths(pieces: Sequence[Piece]) -> list[int]:
    """[L] neurons that each layer has in the file."""
    found: Mapping[int, int] = {
        int(piece.name.split(".")[1]): piece.shape[0] for piece in pieces if ".ffn_gate." in piece.name
    }
    return [found[layer] for layer in sorted(found)]
