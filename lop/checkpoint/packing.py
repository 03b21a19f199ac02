"""Tensors of a checkpoint that is being written, quantised one at a time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lop.checkpoint.bits import Packing
from lop.checkpoint.shards import Cut
from lop.errors import CancelledError
from lop.model.dtypes import DTYPES
from lop.model.rounding import Rounding
from lop.model.tensors import ffn_part
from lop.storage.files import disk_errors
from lop.storage.headers import TensorInfo, read_header, read_tensors


def pack_cuts(
    cuts: Sequence[tuple[str, Cut]],
    packing: Packing,
    folder: Path,
    *,
    packed: Mapping[str, Sequence[tuple[str, TensorInfo]]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[tuple[str, Cut]]:
    """What to write instead, where some of the tensors are to be quantised; the others stay as they are.

    Memory: one matrix, a few times.

    Args:
        cuts: what would be written of each tensor.
        folder: where the quantised ones are kept until they are written.
        packed: those that are quantised already, by the weight's name; the rest is rounded to the nearest.
        progress: called with the matrices rounded and their number.

    Raises:
        LopError: the library is not there.
        CancelledError: `cancelled` said so.
    """
    rounding, packed = Rounding(packing.bits, packing.group), packed or {}
    written: list[tuple[str, Cut]] = []
    left = [name for name, _ in cuts if name in packing.tensors and name not in packed]
    done = 0
    for name, cut in cuts:
        if name in left:
            if cancelled():
                raise CancelledError("the export was cancelled")
            parts: Sequence[tuple[str, TensorInfo]] = write_packed(
                name, rounding.pack(read_cut(cut)), folder / f"{done:05d}.safetensors"
            )
            done += 1
            progress(done, len(left))
        else:
            parts = packed.get(name, ())
        written += [(part, Cut(info, info.shape)) for part, info in parts] or [(name, cut)]
    return written


def write_packed(name: str, parts: Mapping[str, Tensor], file: Path) -> list[tuple[str, TensorInfo]]:
    """Writes the tensors that hold a weight, and tells them by their names in a checkpoint."""
    module = name.removesuffix("weight")
    with disk_errors(file):
        save_file({f"{module}{part}": tensor.cpu().contiguous() for part, tensor in parts.items()}, file)
    return list(read_header(file).items())


def stored_dtype(checkpoint: Path) -> torch.dtype:
    """The type that a checkpoint's FFN weights are stored in, all alike."""
    return DTYPES[next(info.dtype for name, info in read_tensors(checkpoint).items() if ffn_part(name))]


def read_cut(cut: Cut) -> Tensor:
    """The tensor that a cut writes."""
    data = np.fromfile(cut.source.file, np.uint8, cut.source.bytes, offset=cut.source.offset)
    weight = torch.from_numpy(data).view(DTYPES[cut.source.dtype]).view(cut.source.shape)
    for axis, chosen in enumerate((cut.rows, cut.columns)):
        if chosen is not None:
            whole = torch.zeros(cut.shape, dtype=weight.dtype)
            whole.narrow(axis, 0, len(chosen)).copy_(weight.index_select(axis, torch.from_numpy(chosen)))
            return whole
    return weight
