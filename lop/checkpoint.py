"""Pruned checkpoints: written from the dense one tensor by tensor, without building a model."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lop.adapter import open_model
from lop.allocation import Allocation
from lop.errors import LopError
from lop.files import atomic_folder, disk_errors, write_json
from lop.size import TensorInfo, ffn_layer, ffn_part, read_tensors

MANIFEST = "lop.json"
_MODELING = "modeling_lop.py"
_MODEL_CLASS = "LopQwen2_5_VLForConditionalGeneration"
_SHARD_BYTES = 2 * 2**30
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
_OWN = {"config.json", "model.safetensors.index.json", MANIFEST}


@dataclass(frozen=True)
class _Shard:
    name: str
    tensors: tuple[str, ...]


def export(
    source: Path,
    out: Path,
    allocation: Allocation,
    order: np.ndarray,
    *,
    about: Mapping[str, Any],
    progress: bool = False,
) -> None:
    """Writes the checkpoint that keeps the most important neurons of each layer; appears whole or not at all.

    The FFN matrices have really fewer rows and columns. The widths stand in the config's own
    `text_config.per_layer_config`; a small modelling file comes along, so that
    `AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)` opens it without LOP, and `lop.load(out)`
    without remote code. Memory: one shard of at most 2 GiB.

    Args:
        source: the dense checkpoint's folder.
        out: a new folder.
        allocation: the width of each layer.
        order: [L, F] neurons of each layer in the dense numbering, the most important first.
        about: what the manifest should say of where the allocation comes from (target, fingerprints).

    Raises:
        LopError: the source is damaged or does not fit the allocation, or `out` is there already.
        OSError: the disk is full or read-only; nothing is left behind.
    """
    tensors = read_tensors(source)
    _check(tensors, allocation, order)
    kept = [torch.from_numpy(np.ascontiguousarray(row[:width])) for row, width in zip(order, allocation.widths)]
    with atomic_folder(out) as folder:
        _copy_companions(source, folder)
        _write_config(source, folder, allocation)
        shards = _plan(tensors, kept)
        total = sum(info.bytes for info in tensors.values())
        with tqdm(total=total, desc="export", unit="B", unit_scale=True, disable=not progress) as bar:
            for shard in shards:
                _write_shard(folder, shard, tensors, kept, bar)
        if len(shards) > 1:
            weight_map = {name: shard.name for shard in shards for name in shard.tensors}
            write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        hashes = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
        write_json(folder / MANIFEST, {**about, "widths": list(allocation.widths), "sha256": hashes})


def verify(folder: Path) -> dict[str, Any]:
    """Checks each file of an exported checkpoint against its manifest, and returns the manifest.

    Raises:
        LopError: there is no manifest, or a file is missing or changed; names the file.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        hashes: dict[str, str] = manifest["sha256"]
    except (OSError, ValueError, KeyError):
        raise LopError(f"{folder} is not a checkpoint exported by LOP: {MANIFEST} is missing or damaged") from None
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise LopError(f"{folder} is damaged: {name} is missing")
        if _sha256(folder / name) != expected:
            raise LopError(f"{folder} is damaged: {name} is not what was written (SHA-256 differs)")
    return manifest


def load(path: str | Path, *, device: str = "auto", dtype: str = "auto") -> Any:
    """Opens a checkpoint, dense or pruned, as a `Qwen2_5_VLForConditionalGeneration` ready for inference.

    A checkpoint exported by LOP is first checked against the hashes of its manifest.

    Raises:
        LopError: the folder is no such checkpoint, or a damaged one.
    """
    folder = Path(path)
    if (folder / MANIFEST).exists():
        verify(folder)
    return open_model(folder, device=device, dtype=dtype)


def _check(tensors: Mapping[str, TensorInfo], allocation: Allocation, order: np.ndarray) -> None:
    down = {ffn_layer(name): info for name, info in tensors.items() if ffn_part(name) == "down_proj"}
    shape = (len(down), max((info.shape[1] for info in down.values()), default=0))
    if order.shape != shape or len(allocation.widths) != shape[0] or max(allocation.widths) > shape[1]:
        raise LopError(f"an allocation of {order.shape[0]} layers does not fit a checkpoint of (layers, width) {shape}")


def _copy_companions(source: Path, folder: Path) -> None:
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.name not in _OWN:
                shutil.copyfile(file, folder / file.name)
    shutil.copyfile(Path(str(files("lop"))) / "modeling.py", folder / _MODELING)


def _write_config(source: Path, folder: Path, allocation: Allocation) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    config.text_config.per_layer_config = {
        layer: {"intermediate_size": width} for layer, width in enumerate(allocation.widths)
    }
    config.architectures = [_MODEL_CLASS]
    config.auto_map = {"AutoModelForImageTextToText": f"{Path(_MODELING).stem}.{_MODEL_CLASS}"}
    config.save_pretrained(folder)


def _plan(tensors: Mapping[str, TensorInfo], kept: list[Tensor]) -> list[_Shard]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, info in tensors.items():
        written = _written_bytes(name, info, kept)
        if groups[-1] and size + written > _SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += written
    if len(groups) == 1:
        return [_Shard("model.safetensors", tuple(groups[0]))]
    return [
        _Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def _written_bytes(name: str, info: TensorInfo, kept: list[Tensor]) -> int:
    part = ffn_part(name)
    if part is None:
        return info.bytes
    neurons = info.shape[1] if part == "down_proj" else info.shape[0]
    return info.bytes // neurons * len(kept[ffn_layer(name)])


def _write_shard(
    folder: Path, shard: _Shard, tensors: Mapping[str, TensorInfo], kept: list[Tensor], bar: "tqdm[Any]"
) -> None:
    pruned = {}
    for name, tensor in _read(shard, tensors):
        pruned[name] = _slice(name, tensor, kept)
        bar.update(tensors[name].bytes)
    with disk_errors(folder / shard.name):
        save_file(pruned, folder / shard.name, metadata={"format": "pt"})


def _read(shard: _Shard, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for name in shard.tensors:
            file = tensors[name].file
            try:
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                yield name, opened[file].get_tensor(name)
            except SafetensorError as error:
                raise LopError(f"{file} is damaged: {error}") from None


def _slice(name: str, tensor: Tensor, kept: list[Tensor]) -> Tensor:
    part = ffn_part(name)
    if part is None:
        return tensor
    neurons = kept[ffn_layer(name)]
    return tensor[:, neurons].contiguous() if part == "down_proj" else tensor[neurons]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
