"""What a checkpoint holds and weighs, read from its headers without loading it; and targets as users name them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lop.errors import LopError
from lop.files import read_as

FFN_WEIGHT = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight$")
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "B": 10**9}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


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


@dataclass(frozen=True)
class ModelSize:
    """The dense model's numbers that any target is answered from.

    Attributes:
        layers: decoder layers, `L`.
        neurons: FFN neurons of each, `F`.
        parameters: of the whole checkpoint, vision tower included.
        bytes: of all its tensors.
        neuron_parameters: that one neuron holds: its rows of gate and up and its column of down.
        neuron_bytes: the same in bytes.
    """

    layers: int
    neurons: int
    parameters: int
    bytes: int
    neuron_parameters: int
    neuron_bytes: int

    def pruned_parameters(self, budget: int) -> int:
        """Parameters of the checkpoint that keeps `budget` neurons."""
        return self.parameters - (self.layers * self.neurons - budget) * self.neuron_parameters

    def pruned_bytes(self, budget: int) -> int:
        """Tensor bytes of the checkpoint that keeps `budget` neurons."""
        return self.bytes - (self.layers * self.neurons - budget) * self.neuron_bytes


@dataclass(frozen=True)
class Target:
    """What somebody asks for: exactly one of a pruning ratio, and the most parameters or bytes of the checkpoint."""

    ratio: float | None = None
    parameters: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.ratio, self.parameters, self.bytes)) != 1:
            raise LopError("name exactly one target: a ratio, a number of parameters or a number of bytes")


def parse_count(text: str, *, what: str) -> int:
    """Reads `5B`, `350M`, `8GiB`, `2.5GB` or a plain number.

    Raises:
        LopError: the text is no such number, or not above zero.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = found.group(2).upper() if found else ""
    if what == "bytes" and unit.endswith("B"):
        unit = unit[:-1]
    scale = (_BINARY_UNITS | _UNITS if what == "bytes" else _UNITS).get(unit)
    if not found or scale is None or not 1 <= float(found.group(1)) * scale < 2**63:
        raise LopError(f"{text!r} is not a number of {what}: write for instance {'8GiB' if what == 'bytes' else '5B'}")
    return int(float(found.group(1)) * scale)


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


def model_size(tensors: dict[str, TensorInfo]) -> ModelSize:
    """Sums up a dense checkpoint.

    Raises:
        LopError: its decoder layers have no FFN weights, or not all of one width and of as many bytes a number.
    """
    down = down_projections(tensors)
    widths = {info.shape[1] for _, info in down}
    if not widths:
        raise LopError("the checkpoint has no decoder layers with gate_proj, up_proj and down_proj")
    if len(widths) > 1:
        raise LopError(f"the checkpoint is pruned already: its FFN widths differ ({min(widths)} to {max(widths)})")
    if len({info.item_bytes for name, info in tensors.items() if ffn_part(name)}) > 1:
        raise LopError("the checkpoint's FFN weights are of several types: store them all in one")
    _, first = down[0]
    return ModelSize(
        layers=len(down),
        neurons=first.shape[1],
        parameters=sum(info.parameters for info in tensors.values()),
        bytes=sum(info.bytes for info in tensors.values()),
        neuron_parameters=3 * first.shape[0],
        neuron_bytes=3 * first.shape[0] * first.item_bytes,
    )


def ffn_part(name: str) -> str | None:
    """Which FFN matrix of the language backbone a tensor is, if any; the vision tower's are not."""
    found = FFN_WEIGHT.search(name)
    return found.group(2) if found and "visual" not in name else None


def down_projections(tensors: Mapping[str, TensorInfo]) -> list[tuple[str, TensorInfo]]:
    """The layers' `down_proj` weights [H, neurons] with their names, first layer to last.

    Raises:
        LopError: one of them is no matrix.
    """
    down = [(name, info) for name, info in tensors.items() if ffn_part(name) == "down_proj"]
    for name, info in down:
        if len(info.shape) != 2:
            raise LopError(f"{info.file} is damaged: {name} is no matrix, its shape is {info.shape}")
    return sorted(down, key=lambda item: ffn_layer(item[0]))


def ffn_layer(name: str) -> int:
    """The decoder layer that an FFN tensor belongs to."""
    found = FFN_WEIGHT.search(name)
    assert found
    return int(found.group(1))


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
