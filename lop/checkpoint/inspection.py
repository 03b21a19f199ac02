"""`lop inspect`: what a checkpoint is, from its headers, its config and its manifest; and whether it is undamaged."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table

from lop.checkpoint.export import check_hashes, read_manifest
from lop.console import PlainConsole
from lop.errors import LopError
from lop.model.families.registry import FAMILIES
from lop.model.sources import MANIFEST, check_checkpoint
from lop.model.tensors import down_projections
from lop.storage.files import read_as
from lop.storage.headers import read_tensors


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        format: `dense`, or a key of `FORMATS`; a pruned checkpoint without a manifest (as `save_pretrained` leaves) is
            `hf`.
        widths: [L] neurons that each layer keeps.
        stored: [L] neurons that each layer has on disk; more than it keeps if padded.
        neurons: of a layer of the dense model; of the widest layer if nothing tells.
        groups: [L] groups of attention that each layer keeps; empty where all layers keep all.
        dense_groups: of a layer of the dense model.
        bits: of the backbone's weights if they are quantised; None where they are not, or are by types of GGUF.
        parameters, bytes: of all tensors.
        manifest: what the export wrote down (source, target, recovery, fingerprints), without its hashes.
        checked: files that were held against their SHA-256 in the manifest; None without a manifest.
        damage: the first fault found, in one line; empty if there is none.
    """

    path: str
    format: str
    widths: tuple[int, ...]
    stored: tuple[int, ...]
    neurons: int
    bits: int | None
    parameters: int
    bytes: int
    groups: tuple[int, ...] = ()
    dense_groups: int = 0
    manifest: Mapping[str, Any] = field(default_factory=dict)
    checked: int | None = None
    damage: str = ""

    @property
    def ratio(self) -> float:
        """Share of the dense model's FFN neurons that are not there."""
        return 1 - sum(self.widths) / (len(self.widths) * self.neurons)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "ratio": self.ratio, "verified": None if self.checked is None else not self.damage}


def inspect(folder: Path) -> Inspection:
    """Looks at a checkpoint, dense or pruned, and reads it whole if there are hashes to check.

    Raises:
        LopError: the folder holds no checkpoint that LOP takes, or one whose headers are damaged.
    """
    has_manifest = (folder / MANIFEST).exists()
    manifest = read_manifest(folder) if has_manifest else {}
    hashes = manifest.pop("sha256", {})
    damage = _damage(folder, hashes)
    if "gguf" in manifest:
        return _of_gguf(folder, manifest, len(hashes), damage)
    try:
        tensors = check_checkpoint(folder, quantised=True)
    except LopError as error:
        # What is wrong with a file that is not what was written says less than that.
        raise LopError(damage or str(error)) from None
    text = read_as(folder / "config.json", _text_config)
    stored = tuple(info.shape[1] for _, info in down_projections(tensors))
    pruned = "per_layer_config" in text
    kind = manifest.get("format", "hf" if pruned else "dense")
    return Inspection(
        path=str(folder),
        format=kind,
        widths=tuple(manifest.get("widths", stored)),
        stored=stored,
        neurons=manifest.get("neurons", text.get("intermediate_size", max(stored))),
        bits=manifest.get("quantised", {}).get("bits"),
        parameters=sum(info.parameters for info in tensors.values()),
        bytes=sum(info.bytes for info in read_tensors(folder).values()),
        groups=tuple(manifest.get("groups", ())) or _groups(text),
        dense_groups=manifest.get("dense_groups", text.get("num_key_value_heads", 0)),
        manifest=manifest,
        checked=len(hashes) if has_manifest else None,
        damage=damage,
    )


def print_inspection(found: Inspection) -> None:
    """Shows it on the terminal, the widths as a bar chart."""
    facts = Table.grid(padding=(0, 2))
    manifest = found.manifest
    rows = {
        "format": found.format,
        "source": manifest.get("source"),
        "target": f"{manifest['target']:.4f}" if "target" in manifest else None,
        "pruned": f"{found.ratio:.2%} of {len(found.widths)} layers of {found.neurons} neurons",
        "layers": "{}, which were {} of {}".format(len(found.widths), ", ".join(map(str, layers["kept"])), layers["of"])
        if (layers := manifest.get("layers"))
        else None,
        "attention": f"{sum(found.groups)} of {len(found.groups)} layers' {found.dense_groups} groups each"
        if found.groups
        else None,
        "bits": _rounding(manifest.get("quantised")),
        "recovery": manifest.get("recovery"),
        "distilled": "; ".join(map(_learnt, manifest.get("distilled", []))) or None,
        "importance": manifest.get("importance"),
        "parameters": f"{found.parameters:,}",
        "bytes": f"{found.bytes:,}",
        "types": ", ".join(f"{count} {kind}" for kind, count in manifest.get("gguf", {}).get("types", {}).items())
        or None,
        "vision": f"not there: {reason}" if (reason := manifest.get("gguf", {}).get("without_tower")) else None,
        "padding": f"{manifest['padding_bytes']:,} bytes of zeros" if manifest.get("padding_bytes") else None,
        "made from": ", ".join(f"{name} {value}" for name, value in manifest.get("fingerprints", {}).items()) or None,
        "hashes": _verdict(found),
    }
    for name, value in rows.items():
        if value is not None:
            facts.add_row(name, value)
    chart = Table.grid(padding=(0, 2))
    for layer, width in enumerate(found.widths):
        bar = Bar(found.neurons, 0, width, width=40)
        cells: list[RenderableType] = [f"layer {layer}", f"{width}", bar, f"{width / found.neurons:.1%}"]
        if found.groups:
            kept = found.groups[layer]
            cells += ["attention", f"{kept}", Bar(found.dense_groups, 0, kept, width=12)]
        chart.add_row(*cells)
    PlainConsole().print(Group(facts, "", chart))


def _rounding(quantised: Mapping[str, Any] | None) -> str | None:
    if not quantised:
        return None
    parts = "backbone and vision tower" if quantised["vision"] else "backbone"
    how = f"{quantised['rounding']}, {quantised['library']}"
    return f"{quantised['bits']} of the {parts}'s weights, by groups of {quantised['group']} ({how})"


def _learnt(record: Mapping[str, Any]) -> str:
    """What a training came to."""
    kl = record["reward_kl"]
    return f"{record['tokens']:,} tokens, KL to dense {kl['start']:.4f} → {kl['end']:.4f} on the reward samples"


def _of_gguf(folder: Path, manifest: Mapping[str, Any], files: int, damage: str) -> Inspection:
    """What the manifest says, which the hashes vouch for."""
    facts = manifest["gguf"]
    return Inspection(
        path=str(folder),
        format=manifest["format"],
        widths=tuple(manifest["widths"]),
        stored=tuple(facts["stored"]),
        neurons=manifest["neurons"],
        bits=None,
        parameters=facts["parameters"],
        bytes=facts["bytes"],
        groups=tuple(manifest.get("groups", ())),
        dense_groups=manifest.get("dense_groups", 0),
        manifest=manifest,
        checked=files,
        damage=damage,
    )


def _groups(text: Mapping[str, Any]) -> tuple[int, ...]:
    """By a config alone, as `save_pretrained` leaves it: it names the layers that differ."""
    layers = {int(layer): entry.get("num_key_value_heads") for layer, entry in text.get("per_layer_config", {}).items()}
    if not any(kept is not None for kept in layers.values()):
        return ()
    whole = text["num_key_value_heads"]
    return tuple(whole if (kept := layers.get(layer)) is None else kept for layer in range(text["num_hidden_layers"]))


def _text_config(config: Any) -> dict[str, Any]:
    text = FAMILIES[config["model_type"]].text_config(config)
    return {**text, "intermediate_size": int(text["intermediate_size"])} if "intermediate_size" in text else text


def _damage(folder: Path, hashes: Mapping[str, str]) -> str:
    try:
        check_hashes(folder, hashes)
    except LopError as error:
        return str(error)
    return ""


def _verdict(found: Inspection) -> str:
    if found.damage:
        return "DAMAGED"
    if found.checked is None:
        return f"none: there is no {MANIFEST}"
    return f"all {found.checked} files are as they were written"
