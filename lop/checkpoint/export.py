"""Pruned checkpoints: written from the dense one as a stream, without building a model."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lop import __version__
from lop.checkpoint.bits import BITS, Packing
from lop.checkpoint.formats import (
    FORMATS,
    Format,
    KeptHeads,
    changed_tensors,
    check_format,
    check_heads,
    cut_tensors,
    pruned_config,
)
from lop.checkpoint.writing import Parts, companions, write_checkpoint, write_gguf
from lop.errors import LopError
from lop.model.sources import MANIFEST, MODELING, check_checkpoint, family_of
from lop.model.tensors import down_projections
from lop.space.allocation import Allocation
from lop.storage.destination import check_new
from lop.storage.files import read_json
from lop.storage.headers import TensorInfo
from lop.storage.location import Location

_HASHED = 8 * 2**20


def export(
    source: Path,
    out: str | Path | Location,
    allocation: Allocation,
    order: np.ndarray,
    *,
    about: Mapping[str, Any],
    groups: np.ndarray | None = None,
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
    read, and about 100 MiB of buffers, whatever the checkpoint's size. The `gguf` formats are files that llama.cpp
    runs, with tokenizer and chat template inside.

    Args:
        source: the dense checkpoint's folder, single file or sharded.
        out: a new folder: a local path, a URI that pyarrow knows, such as `s3://bucket/folder`, or a location.
        allocation: the width of each layer's FFN, and of its attention if that is pruned, too.
        order: [L, F] neurons of each layer in the dense numbering, the most important first.
        groups: [L, K] the same for the groups of attention, where these are pruned.
        about: what the manifest should say of where the allocation comes from (target, fingerprints).
        recovered: tensors that recovery has refitted or added; see `lop.checkpoint.recovery.recover_checkpoint`.
        packing: how to quantise what is written; None leaves weights as they are.
        packed: weights that are quantised already, by their names; see `lop.checkpoint.compensation`.
        scratch: where quantised weights wait until they are written; by default the system's place for such files.
        progress: called in this thread with the bytes written so far and in all.
        on_matrix: called with the matrices quantised so far and in all.
        cancelled: asked after each matrix that is quantised, and about every 8 MiB, whether to give up.

    Returns:
        The manifest, as it stands in `lop.json`.

    Raises:
        LopError: the source is damaged, no dense model that LOP takes or of another shape than the allocation; the
            format has no place for biases that recovery adds, or for quantised weights; or `out` is there already.
        CancelledError: `cancelled` said so.
        OSError: the disk is full or read-only. After any error nothing is left behind.
    """
    tensors, family = check_checkpoint(source, dense=True), family_of(source)
    widths, heads = allocation.widths[: len(order)], kept_heads(allocation, groups)
    _check(tensors, widths, order)
    recovered = recovered or {}
    bias = any(name not in tensors for name in recovered)
    bits = packing.bits if packing else BITS[0]
    check_format(format, "bias" if bias else "none", bits)
    if heads:
        check_heads(format)
    cuts = cut_tensors(tensors, order, widths, format=format, recovered=recovered, heads=heads)
    if packing:
        packing = packing.without([name for name, cut in cuts if 0 in cut.shape], family)
    about = {**about, "format": format, "widths": list(widths), "neurons": order.shape[1]}
    if heads:
        about |= {"groups": list(heads.widths), "dense_groups": heads.groups}
    place = Location.parse(out)
    if FORMATS[format].gguf:
        return write_gguf(source, place, cuts, about, progress, cancelled)
    config = pruned_config(read_json(source / "config.json"), widths, format=format, bias=bias, heads=heads)
    manifest = {**about, "padding_bytes": sum(cut.padding * cut.source.item_bytes for _, cut in cuts)}
    beside = companions(source)
    if not FORMATS[format].is_padded:
        beside[MODELING] = _source(family.modeling)
    return write_checkpoint(
        place,
        Parts(cuts, config, manifest, beside),
        source,
        family,
        packing=packing,
        packed=packed,
        scratch=scratch,
        progress=progress,
        on_matrix=on_matrix,
        cancelled=cancelled,
    )


def kept_heads(allocation: Allocation, groups: np.ndarray | None) -> KeptHeads | None:
    """What an allocation keeps of attention; None where it keeps all.

    Args:
        groups: [L, K] groups of each layer, the most important first; None if attention is not open.

    Raises:
        LopError: the allocation is of other axes.
    """
    if groups is None:
        return None
    layers, kept = len(groups), allocation.widths[len(groups) :]
    if len(kept) != layers or max(kept) > groups.shape[1]:
        raise LopError(f"an allocation of {len(allocation.widths)} axes does not fit {layers} layers with attention")
    return KeptHeads(groups, kept) if min(kept) < groups.shape[1] else None


def rewrite(
    checkpoint: Path,
    out: str | Path | Location,
    changed: Mapping[str, TensorInfo],
    *,
    dense: Path,
    about: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Writes an exported checkpoint again with other weights in it; appears whole or not at all.

    Format, widths, config, modelling file and all that comes along stay as they are.

    Args:
        checkpoint: one that LOP exported.
        out: as in `export`.
        changed: what takes the place of some of its tensors, by its names, without padding.
        dense: the checkpoint that it was pruned from, whose card tells the licence.
        about: what its manifest is to say beside what it says already, or instead.
        progress, cancelled: as in `export`.

    Returns:
        The manifest, as it stands in `lop.json`.

    Raises:
        LopError: the checkpoint is none of LOP's, or damaged, or a tensor does not fit it; or `out` is there already.
        CancelledError: `cancelled` said so.
        OSError: the disk is full or read-only. After any error nothing is left behind.
    """
    tensors, family = check_checkpoint(checkpoint), family_of(checkpoint)
    manifest = {**read_manifest(checkpoint), **about}
    del manifest["sha256"]
    cuts = changed_tensors(tensors, changed, format=manifest["format"])
    parts = Parts(cuts, read_json(checkpoint / "config.json"), manifest, companions(checkpoint))
    return write_checkpoint(Location.parse(out), parts, dense, family, progress=progress, cancelled=cancelled)


def convert(
    source: Path,
    out: str | Path | Location,
    *,
    format: Format = "gguf",
    progress: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Writes a checkpoint, dense or exported by LOP, in one of the `gguf` formats; appears whole or not at all.

    Args:
        source: the checkpoint's folder; one with a manifest is first checked against its hashes.
        The others are those of `export`.

    Returns:
        The manifest: the source's, if it has one, with what is new.

    Raises:
        LopError: as `export`; or the format is none of GGUF.
        CancelledError, OSError: as `export`.
    """
    if not FORMATS[format].gguf:
        others = ", ".join(name for name, layout in FORMATS.items() if layout.gguf)
        raise LopError(
            f"checkpoints are converted to {others}, not to {format!r}: prune the dense model again for that"
        )
    check_format(format, "none")
    tensors = check_checkpoint(source)
    place = Location.parse(out)
    made: dict[str, Any] = verify(source) if (source / MANIFEST).exists() else {"source": str(source)}
    if "groups" in made and not FORMATS[made["format"]].is_padded:
        raise LopError(
            f"{source} has a number of heads of its own in each layer, which no GGUF file has: prune the dense model "
            f"again, to {format.replace('-true', '')!r}"
        )
    found = [info.shape[1] for _, info in down_projections(tensors)]
    widths = made.get("widths", found)
    cuts = cut_tensors(tensors, [np.arange(width) for width in found], widths, format=format, recovered={})
    check_new(place, bytes=sum(cut.bytes for _, cut in cuts))
    about = {key: value for key, value in made.items() if key not in ("sha256", "padding_bytes")}
    about |= {"version": __version__, "format": format, "widths": list(widths)}
    about.setdefault("neurons", max(found))
    return write_gguf(source, place, cuts, about, progress, cancelled)


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
        kinds = {"neurons": int, "dense_groups": int, "padding_bytes": int, "target": float, "fingerprints": dict}
        return {
            **manifest,
            **{name: kind(manifest[name]) for name, kind in kinds.items() if name in manifest},
            "widths": [int(width) for width in manifest["widths"]],
            **({"groups": [int(kept) for kept in manifest["groups"]]} if "groups" in manifest else {}),
            "sha256": dict(manifest["sha256"]),
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise LopError(f"{folder} is not a checkpoint exported by LOP: {MANIFEST} is missing or damaged") from None


def source_of(checkpoint: Path) -> str:
    """The name of the dense model that a checkpoint was pruned from.

    Raises:
        LopError: LOP has not exported it, or its manifest does not name any.
    """
    source = read_manifest(checkpoint).get("source")
    if not source:
        raise LopError(f"{checkpoint} does not say what it was pruned from: name the dense model with --model")
    return str(source)


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


def _check(tensors: Mapping[str, TensorInfo], widths: Sequence[int], order: np.ndarray) -> None:
    down = down_projections(tensors)
    shape = (len(down), max((info.shape[1] for _, info in down), default=0))
    if order.shape != shape or len(widths) != shape[0] or max(widths) > shape[1]:
        raise LopError(f"an allocation of {order.shape[0]} layers does not fit a checkpoint of (layers, width) {shape}")
    if not (np.sort(order, axis=1) == np.arange(shape[1])).all():
        raise LopError("the order of the neurons does not name each neuron of a layer once")


def _source(module: str) -> bytes:
    """The text of a module, which need not be imported."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_bytes()
