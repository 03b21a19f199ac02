"""Pruned checkpoints: written from the dense one as a stream, without building a model."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lop.checkpoint.bits import Packing
from lop.checkpoint.card import CARD, model_card
from lop.checkpoint.formats import FORMATS, Format, check_format, cut_tensors, pruned_config
from lop.checkpoint.shards import Cut, ShardWriter, plan_shards, write_all
from lop.errors import CancelledError, LopError
from lop.model.families.family import Family
from lop.model.sources import MANIFEST, MODELING, check_checkpoint, family_of
from lop.model.tensors import down_projections
from lop.space.allocation import Allocation
from lop.storage.destination import NewFolder, new_folder
from lop.storage.files import read_json
from lop.storage.headers import TensorInfo
from lop.storage.location import Location

_INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_HASHED = 8 * 2**20
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
_OWN = {"config.json", _INDEX, MANIFEST}


def export(
    source: Path,
    out: str | Path | Location,
    allocation: Allocation,
    order: np.ndarray,
    *,
    about: Mapping[str, Any],
    format: Format = "hf",
    recovered: Mapping[str, TensorInfo] | None = None,
    packing: Packing | None = None,
    packed: Mapping[str, Sequence[tuple[str, TensorInfo]]] | None = None,
    scratch: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_matrix: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Writes the checkpoint that keeps the most important neurons of each layer; appears whole or not at all.

    The FFN matrices have really fewer rows and columns; format `padded` fills them up to the widest layer with zeros.
    Tokenizer, processor, chat template and generation config come along. Memory: one FFN matrix, the next one being
    read, and about 100 MiB of buffers, whatever the checkpoint's size.

    Args:
        source: the dense checkpoint's folder, single file or sharded.
        out: a new folder: a local path, a URI that pyarrow knows, such as `s3://bucket/folder`, or a location.
        allocation: the width of each layer.
        order: [L, F] neurons of each layer in the dense numbering, the most important first.
        about: what the manifest should say of where the allocation comes from (target, fingerprints).
        recovered: tensors that recovery has refitted or added; see `lop.checkpoint.recovery.recover_checkpoint`.
        packing: how to quantise what is written; None leaves weights as they are.
        packed: weights that are quantised already, by their names; see `lop.checkpoint.compensation`.
        scratch: where quantised weights wait until they are written; by default the system's place for such files.
        progress: called in this thread with the bytes written so far and in all.
        on_matrix: called with the matrices quantised so far and in all.
        cancelled: asked after each matrix, and about every 8 MiB, whether to give up.

    Returns:
        The manifest, as it stands in `lop.json`.

    Raises:
        LopError: the source is damaged, no dense model that LOP takes or of another shape than the allocation, or `out`
            is there already.
        CancelledError: `cancelled` said so.
        OSError: the disk is full or read-only. After any error nothing is left behind.
    """
    tensors, family = check_checkpoint(source, dense=True), family_of(source)
    _check(tensors, allocation, order)
    recovered = recovered or {}
    bias = any(name not in tensors for name in recovered)
    check_format(format, "bias" if bias else "none")
    cuts = cut_tensors(tensors, order, allocation.widths, format=format, recovered=recovered)
    config = pruned_config(read_json(source / "config.json"), allocation.widths, format=format, bias=bias)
    manifest = {
        **about,
        "format": format,
        "widths": list(allocation.widths),
        "neurons": order.shape[1],
        "padding_bytes": _padding(cuts),
    }
    beside = companions(source)
    if not FORMATS[format].is_padded:
        beside[MODELING] = _source(family.modeling)
    return write_checkpoint(
        source,
        out,
        Parts(cuts, config, manifest, beside),
        family,
        packing=packing,
        packed=packed,
        scratch=scratch,
        progress=progress,
        on_matrix=on_matrix,
        cancelled=cancelled,
    )


@dataclass(frozen=True)
class Parts:
    """What a checkpoint is made of, before anything of it is quantised.

    Attributes:
        cuts: its tensors.
        config: what stands in its `config.json`.
        manifest: what its `lop.json` says, but for the hashes.
        companions: its other files.
    """

    cuts: list[tuple[str, Cut]]
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    companions: Mapping[str, bytes]


def write_checkpoint(
    source: Path,
    out: str | Path | Location,
    parts: Parts,
    family: Family,
    *,
    packing: Packing | None = None,
    packed: Mapping[str, Sequence[tuple[str, TensorInfo]]] | None = None,
    scratch: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_matrix: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Writes a new checkpoint, quantised if it is to be, with card, manifest and hashes; arguments as in `export`.

    Returns:
        The manifest.

    Raises:
        LopError: `out` is there already, or the library that quantises is not.
        CancelledError: `cancelled` said so.
        OSError: the disk is full or read-only. After any error nothing is left behind.
    """
    cuts, config, manifest = parts.cuts, dict(parts.config), dict(parts.manifest)
    parameters = sum(prod(cut.shape) for _, cut in cuts)
    with TemporaryDirectory(prefix="lop-packed-", dir=scratch) as spool, new_folder(Location.parse(out)) as folder:
        if packing is not None:
            from lop.checkpoint.packing import pack_cuts
            from lop.model.rounding import library

            cuts = pack_cuts(cuts, packing, Path(spool), packed=packed, progress=on_matrix, cancelled=cancelled)
            config["quantization_config"] = packing.config
            rounding = "compensated" if packed else "nearest"
            manifest["quantised"] = {**packing.about, "rounding": rounding, "library": library()}
        hashes = _write_weights(folder, cuts, progress, cancelled)
        for name, data in parts.companions.items():
            hashes[name] = _write(folder, name, data)
        text = _json(config)
        hashes["config.json"] = hashlib.sha256(text).hexdigest()
        size = sum(cut.bytes for _, cut in cuts)
        hashes[CARD] = _write(folder, CARD, model_card(source, family, manifest, parameters=parameters, size=size))
        manifest["sha256"] = dict(sorted(hashes.items()))
        _write(folder, MANIFEST, _json(manifest))
        # Last, as it is what loaders look for: where a folder cannot be renamed it makes this one a checkpoint.
        _write(folder, "config.json", text)
    return manifest


def verify(
    folder: Path | Location, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Checks each file of an exported checkpoint against its manifest, and returns the manifest.

    Every byte is read, on remote storage, too.

    Args:
        progress: called with the bytes read so far and in all, about every 8 MiB; ends the check by raising.

    Raises:
        LopError: there is no manifest, or a file is missing or changed; names the file.
    """
    manifest = read_manifest(folder)
    check_hashes(folder, manifest["sha256"], progress=progress)
    return manifest


def check_hashes(
    folder: Path | Location,
    hashes: Mapping[str, str],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Holds files against their SHA-256.

    Args:
        progress: as in `verify`.

    Raises:
        LopError: one is missing or changed; names the file.
    """
    place = Location.parse(folder)
    for name in hashes:
        if not place.has(name):
            raise LopError(f"{folder} is damaged: {name} is missing")
    total, done = sum(place.size(name) for name in hashes), 0
    for name, expected in hashes.items():
        digest = hashlib.sha256()
        with place.open(name) as file:
            while block := file.read(_HASHED):
                digest.update(block)
                done += len(block)
                progress(done, total)
        if digest.hexdigest() != expected:
            raise LopError(f"{folder} is damaged: {name} is not what was written (SHA-256 differs)")


def read_manifest(folder: Path | Location) -> dict[str, Any]:
    """The manifest of an exported checkpoint, its files unchecked.

    Raises:
        LopError: there is none, or it is damaged.
    """
    try:
        manifest: dict[str, Any] = json.loads(Location.parse(folder).read(MANIFEST))
        kinds = {"neurons": int, "padding_bytes": int, "target": float, "fingerprints": dict}
        return {
            **manifest,
            **{name: kind(manifest[name]) for name, kind in kinds.items() if name in manifest},
            "widths": [int(width) for width in manifest["widths"]],
            "sha256": dict(manifest["sha256"]),
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise LopError(f"{folder} is not a checkpoint exported by LOP: {MANIFEST} is missing or damaged") from None


def load(path: str | Path, *, device: str = "auto", dtype: str = "auto") -> Any:
    """Opens a checkpoint, dense or pruned, as transformers' class of its family, ready for inference.

    A checkpoint exported by LOP is first checked against the hashes of its manifest.

    Raises:
        LopError: the folder is no such checkpoint, or a damaged one.
    """
    from lop.model.adapter import open_model

    folder = Path(path)
    if (folder / MANIFEST).exists():
        verify(folder)
    return open_model(folder, device=device, dtype=dtype)


def _check(tensors: Mapping[str, TensorInfo], allocation: Allocation, order: np.ndarray) -> None:
    down = down_projections(tensors)
    shape = (len(down), max((info.shape[1] for _, info in down), default=0))
    if order.shape != shape or len(allocation.widths) != shape[0] or max(allocation.widths) > shape[1]:
        raise LopError(f"an allocation of {order.shape[0]} layers does not fit a checkpoint of (layers, width) {shape}")
    if not (np.sort(order, axis=1) == np.arange(shape[1])).all():
        raise LopError("the order of the neurons does not name each neuron of a layer once")


def _write_weights(
    folder: NewFolder,
    cuts: list[tuple[str, Cut]],
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> dict[str, str]:
    total, done = sum(cut.bytes for _, cut in cuts), 0
    progress(0, total)

    def count(written: int) -> None:
        nonlocal done
        if cancelled():
            raise CancelledError("the export was cancelled")
        done += written
        progress(done, total)

    shards = plan_shards(cuts, SHARD_BYTES)
    hashes = {}
    with ShardWriter(count) as writer:
        for shard in shards:
            with folder.create(shard.name) as file:
                hashes[shard.name] = writer.write(file, shard)
    if len(shards) > 1:
        weight_map = {name: shard.name for shard in shards for name, _ in shard.cuts}
        hashes[_INDEX] = _write(folder, _INDEX, _json({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return hashes


def companions(source: Path) -> dict[str, bytes]:
    """The files that come along as they are: tokenizer, processor, chat template, generation config."""
    return {
        file.name: file.read_bytes()
        for pattern in _COMPANIONS
        for file in source.glob(pattern)
        if file.name not in _OWN
    }


def _source(module: str) -> bytes:
    """The text of a module, which need not be imported."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_bytes()


def _padding(cuts: list[tuple[str, Cut]]) -> int:
    """Bytes of the zeros that fill layers up to the widest."""
    padding = 0
    for _, cut in cuts:
        for axis, chosen in enumerate((cut.rows, cut.columns)):
            if chosen is not None:
                padding += cut.bytes // cut.shape[axis] * (cut.shape[axis] - len(chosen))
    return padding


def _write(folder: NewFolder, name: str, data: bytes) -> str:
    with folder.create(name) as file:
        write_all(file, memoryview(data))
    return hashlib.sha256(data).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
