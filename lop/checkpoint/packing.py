"""Tensors of a checkpoint that is being written, quantised one at a time."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lop.checkpoint.bits import Packing
from lop.checkpoint.shards import Cut
from lop.errors import CancelledError
from lop.model.rounding import Rounding
from lop.storage.files import disk_errors
from lop.storage.headers import read_header

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def pack_cuts(
    cuts: Sequence[tuple[str, Cut]],
    packing: Packing,
    folder: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[tuple[str, Cut]]:
    """What to write instead, where some of the tensors are to be quantised; the others stay as they are.

    Memory: one matrix, a few times.

    Args:
        cuts: what would be written of each tensor.
        folder: where the quantised ones are kept until they are written.
        progress: called with the matrices done and their number.

    Raises:
        LopError: the library is not there.
        CancelledError: `cancelled` said so.
    """
    rounding = Rounding(packing.bits, packing.group)
    written: list[tuple[str, Cut]] = []
    done, total = 0, sum(name in packing.tensors for name, _ in cuts)
    progress(0, total)
    for name, cut in cuts:
        if name not in packing.tensors:
            written.append((name, cut))
            continue
        if cancelled():
            raise CancelledError("the export was cancelled")
        written += _packed(name, cut, rounding, folder / f"{done:05d}.safetensors")
        done += 1
        progress(done, total)
    return written


def read_cut(cut: Cut) -> Tensor:
    """The tensor that a cut writes."""
    data = np.fromfile(cut.source.file, np.uint8, cut.source.bytes, offset=cut.source.offset)
    weight = torch.from_numpy(data).view(_DTYPES[cut.source.dtype]).view(cut.source.shape)
    for axis, chosen in enumerate((cut.rows, cut.columns)):
        if chosen is not None:
            whole = torch.zeros(cut.shape, dtype=weight.dtype)
            whole.narrow(axis, 0, len(chosen)).copy_(weight.index_select(axis, torch.from_numpy(chosen)))
            return whole
    return weight


def _packed(name: str, cut: Cut, rounding: Rounding, file: Path) -> Iterator[tuple[str, Cut]]:
    module = name.removesuffix("weight")
    with disk_errors(file):
        save_file({f"{module}{part}": tensor for part, tensor in rounding.pack(read_cut(cut)).items()}, file)
    for part, info in read_header(file).items():
        yield part, Cut(info, info.shape)
