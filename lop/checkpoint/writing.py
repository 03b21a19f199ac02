"""A checkpoint written from its parts, by transformers' layout or by llama.cpp's; it appears whole or not at all."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lop.checkpoint.bits import Packing
from lop.checkpoint.card import CARD, model_card
from lop.checkpoint.edge.files import plan, write
from lop.checkpoint.formats import FORMATS
from lop.checkpoint.shards import Cut, ShardWriter, plan_shards, write_all
from lop.errors import CancelledError
from lop.model.families.family import Family
from lop.model.sources import MANIFEST, MODELING, family_of
from lop.storage.destination import NewFolder, new_folder
from lop.storage.headers import TensorInfo
from lop.storage.location import Location

log = logging.getLogger(__name__)
_INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", MODELING)
_OWN = {"config.json", _INDEX, MANIFEST}


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
    place: Location,
    parts: Parts,
    dense: Path,
    family: Family,
    *,
    packing: Packing | None = None,
    packed: Mapping[str, Sequence[tuple[str, TensorInfo]]] | None = None,
    scratch: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    on_matrix: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Writes a new checkpoint, quantised if it is to be, with card, manifest and hashes.

    Args:
        place: a new folder.
        dense: the checkpoint whose card tells the licence.
        family: of both.
        The others are those of `lop.checkpoint.export.export`.

    Returns:
        The manifest.

    Raises:
        LopError: `place` is there already, or the library that quantises is not.
        CancelledError: `cancelled` said so.
        OSError: the disk is full or read-only. After any error nothing is left behind.
    """
    cuts, config, manifest = parts.cuts, dict(parts.config), dict(parts.manifest)
    parameters = sum(prod(cut.shape) for _, cut in cuts)
    with TemporaryDirectory(prefix="lop-packed-", dir=scratch) as spool, new_folder(place) as folder:
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
        hashes[CARD] = _write(folder, CARD, model_card(dense, family, manifest, parameters=parameters, size=size))
        manifest["sha256"] = dict(sorted(hashes.items()))
        _write(folder, MANIFEST, _json(manifest))
        # Last, as it is what loaders look for: where a folder cannot be renamed it makes this one a checkpoint.
        _write(folder, "config.json", text)
    return manifest


def write_gguf(
    source: Path,
    place: Location,
    cuts: Sequence[tuple[str, Cut]],
    about: Mapping[str, Any],
    progress: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> dict[str, Any]:
    """Writes GGUF files, with card, manifest and hashes, and returns the manifest.

    Args:
        source: the checkpoint whose config, tokenizer and licence it has.
        cuts: its tensors.
        about: what its manifest says, the format included, but for what the files tell.
        The others are those of `lop.checkpoint.export.export`.

    Raises:
        LopError: llama.cpp cannot compute the model, or `place` is there already.
        CancelledError, OSError: as `write_checkpoint`.
    """
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


def companions(source: Path) -> dict[str, bytes]:
    """The files that come along as they are: tokenizer, processor, chat template, modelling file."""
    return {
        file.name: file.read_bytes()
        for pattern in _COMPANIONS
        for file in source.glob(pattern)
        if file.name not in _OWN
    }


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


def _write(folder: NewFolder, name: str, data: bytes) -> str:
    with folder.create(name) as file:
        write_all(file, memoryview(data))
    return hashlib.sha256(data).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
