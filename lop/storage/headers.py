"""What safetensors files hold, read from their headers without loading them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lop.errors import LopError
from lop.storage.files import read_as

_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: its dtype's name, its shape, the file that holds it, and from which byte on."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def parameters(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        return self.parameters * self.item_bytes

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype]


def read_tensors(checkpoint: Path) -> dict[str, TensorInfo]:
    """The tensors of a local checkpoint folder, single file or sharded, from the safetensors headers.

    Raises:
        LopError: a file is missing or its header damaged.
    """
    return {name: info for file in weight_files(checkpoint) for name, info in read_header(file).items()}


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in name order.

    Raises:
        LopError: there are none, or the index names one that is missing.
    """
    index = checkpoint / "model.safetensors.index.json"
    names = read_as(index, _indexed) if index.exists() else ["model.safetensors"]
    for name in names:
        if not (checkpoint / name).is_file():
            raise LopError(f"{checkpoint} is not a complete checkpoint: {name} is missing")
    return [checkpoint / name for name in names]


def _indexed(index: Any) -> list[str]:
    return sorted({str(Path(name)) for name in index["weight_map"].values()})


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of its header.

    Raises:
        LopError: the header is damaged, or the file is shorter or longer than it says.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length)) if length < 2**28 else {}
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(entry["shape"]), file, 8 + length + entry["data_offsets"][0])
            for name, entry in entries.items()
        }
        if any(
            tensors[name].offset + tensors[name].bytes != 8 + length + entries[name]["data_offsets"][1]
            for name in tensors
        ):
            raise ValueError
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        raise LopError(f"{file} is damaged: its safetensors header cannot be read") from None
    if file.stat().st_size != 8 + length + end:
        raise LopError(f"{file} is damaged: {file.stat().st_size} bytes instead of {8 + length + end}")
    return tensors
