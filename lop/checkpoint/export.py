"""Pruned checkpoints: written from the dense one as a stream, without building a model."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lop import __version__
from lop.checkpoint.card import CARD, model_card
from lop.checkpoint.edge.files import plan, write
from lop.checkpoint.formats import FORMATS, Format, changed_tensors, check_format, cut_tensors, pruned_config
from lop.checkpoint.shards import Cut, ShardWriter, plan_shards, write_all
from lop.errors import CancelledError, LopError
from lop.model.families.family import Family
from lop.model.sources import MANIFEST, MODELING, check_checkpoint, family_of
from lop.model.tensors import down_projections
from lop.space.allocation import Allocation
from lop.storage.destination import NewFolder, check_new, new_folder
from lop.storage.files import read_json
from lop.storage.headers import TensorInfo
from lop.storage.location import Location

log = logging.getLogger(__name__)
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
    progress: Callable[[int, int], None] = lambda done, total: None,
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
        allocation: the width of each layer.
        order: [L, F] neurons of each layer in the dense numbering, the most important first.
        about: what the manifest should say of where the allocation comes from (target, fingerprints).
        recovered: tensors that recovery has refitted or added; see `lop.checkpoint.recovery.recover_checkpoint`.
        progress: called in this thread with the bytes written so far and in all.
        cancelled: asked about every 8 MiB whether to give up.

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
    about = {**about, "format": format, "widths": list(allocation.widths), "neurons": order.shape[1]}
    place = Location.parse(out)
    if FORMATS[format].gguf:
        return _export_gguf(source, place, cuts, about, progress, cancelled)
    config = pruned_config(read_json(source / "config.json"), allocation.widths, format=format, bias=bias)
    manifest = {**about, "padding_bytes": sum(cut.padding * cut.source.item_bytes for _, cut in cuts)}
    made = _Checkpoint(cuts, _companions(source, family, format), _json(config), manifest)
    return _write_checkpoint(place, made, source, family, progress, cancelled)


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
        changed: what takes the place of some of its tensors, by its names; FFN weights without padding.
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
    format = manifest["format"]
    cuts = changed_tensors(tensors, changed, format=format)
    config = (checkpoint / "config.json").read_bytes()
    made = _Checkpoint(cuts, _companions(checkpoint, family, format), config, manifest)
    return _write_checkpoint(Location.parse(out), made, dense, family, progress, cancelled)


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
    found = [info.shape[1] for _, info in down_projections(tensors)]
    widths = made.get("widths", found)
    cuts = cut_tensors(tensors, [np.arange(width) for width in found], widths, format=format, recovered={})
    check_new(place, bytes=sum(cut.bytes for _, cut in cuts))
    about = {key: value for key, value in made.items() if key not in ("sha256", "padding_bytes")}
    about |= {"version": __version__, "format": format, "widths": list(widths)}
    about.setdefault("neurons", max(found))
    return _export_gguf(source, place, cuts, about, progress, cancelled)


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


@dataclass(frozen=True)
class _Checkpoint:
    """What is to be written: tensors, files that come along by name, `config.json`, and the manifest without hashes."""

    cuts: list[tuple[str, Cut]]
    companions: dict[str, bytes]
    config: bytes
    manifest: dict[str, Any]


def _write_checkpoint(
    place: Location,
    made: _Checkpoint,
    dense: Path,
    family: Family,
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> dict[str, Any]:
    """Writes everything, and returns the manifest with the hashes."""
    with new_folder(place) as folder:
        hashes = _write_weights(folder, made.cuts, progress, cancelled)
        for name, data in made.companions.items():
            hashes[name] = _write(folder, name, data)
        hashes["config.json"] = hashlib.sha256(made.config).hexdigest()
        parameters, size = (sum(values) for values in zip(*((prod(cut.shape), cut.bytes) for _, cut in made.cuts)))
        card = model_card(dense, family, made.manifest, parameters=parameters, size=size)
        hashes[CARD] = _write(folder, CARD, card)
        manifest = {**made.manifest, "sha256": dict(sorted(hashes.items()))}
        _write(folder, MANIFEST, _json(manifest))
        # Last, as it is what loaders look for: where a folder cannot be renamed it makes this one a checkpoint.
        _write(folder, "config.json", made.config)
    return manifest


def _check(tensors: Mapping[str, TensorInfo], allocation: Allocation, order: np.ndarray) -> None:
    down = down_projections(tensors)
    shape = (len(down), max((info.shape[1] for _, info in down), default=0))
    if order.shape != shape or len(allocation.widths) != shape[0] or max(allocation.widths) > shape[1]:
        raise LopError(f"an allocation of {order.shape[0]} layers does not fit a checkpoint of (layers, width) {shape}")
    if not (np.sort(order, axis=1) == np.arange(shape[1])).all():
        raise LopError("the order of the neurons does not name each neuron of a layer once")


def _export_gguf(
    source: Path,
    place: Location,
    cuts: list[tuple[str, Cut]],
    about: Mapping[str, Any],
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> dict[str, Any]:
    kind = FORMATS[about["format"]].gguf
    assert kind is not None
    family, name = family_of(source), Path(str(about.get("source", source))).name
    planned = plan(source, cuts, kind, name=name)
    if planned.without_tower:
        log.warning("the language model alone is written: %s", planned.without_tower)
    facts = planned.facts
    with new_folder(place) as folder:
        hashes = write(folder, planned, _counter(facts["bytes"], progress, cancelled))
        for licence in source.glob("LICENSE*"):
            hashes[licence.name] = _write(folder, licence.name, licence.read_bytes())
        manifest = {**about, "padding_bytes": planned.padding_bytes, "gguf": facts}
        card = model_card(source, family, manifest, parameters=facts["parameters"], size=facts["bytes"])
        hashes[CARD] = _write(folder, CARD, card)
        manifest["sha256"] = dict(sorted(hashes.items()))
        # Last: where a folder cannot be renamed it says that this one is whole.
        _write(folder, MANIFEST, _json(manifest))
    return manifest


def _counter(total: int, progress: Callable[[int, int], None], cancelled: Callable[[], bool]) -> Callable[[int], None]:
    """What is told of each few megabytes written."""
    done = 0
    progress(0, total)

    def count(written: int) -> None:
        nonlocal done
        if cancelled():
            raise CancelledError("the export was cancelled")
        done += written
        progress(done, total)

    return count


def _write_weights(
    folder: NewFolder,
    cuts: list[tuple[str, Cut]],
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> dict[str, str]:
    total = sum(cut.bytes for _, cut in cuts)
    shards = plan_shards(cuts, SHARD_BYTES)
    hashes = {}
    with ShardWriter(_counter(total, progress, cancelled)) as writer:
        for shard in shards:
            with folder.create(shard.name) as file:
                hashes[shard.name] = writer.write(file, shard)
    if len(shards) > 1:
        weight_map = {name: shard.name for shard in shards for name, _ in shard.cuts}
        hashes[_INDEX] = _write(folder, _INDEX, _json({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return hashes


def _companions(source: Path, family: Family, format: Format) -> dict[str, bytes]:
    found = {
        file.name: file.read_bytes()
        for pattern in _COMPANIONS
        for file in source.glob(pattern)
        if file.name not in _OWN
    }
    if not FORMATS[format].is_padded:
        found[MODELING] = _source(family.modeling)
    return found


def _source(module: str) -> bytes:
    """The text of a module, which need not be imported."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_bytes()


def _write(folder: NewFolder, name: str, data: bytes) -> str:
    with folder.create(name) as file:
        write_all(file, memoryview(data))
    return hashlib.sha256(data).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
