"""What a folder holds, told from its config and its headers before anything is built of it, and whether LOP takes it.

transformers builds its default model, one of 72B, from a config of another type, and a reader of weights takes packed
integers for numbers: whatever opens a checkpoint looks here first.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lop.errors import LopError
from lop.model.families.family import Family
from lop.model.families.registry import FAMILIES
from lop.model.tensors import down_projections
from lop.storage.files import read_as, read_json
from lop.storage.headers import TensorInfo, read_tensors

# Of an exported checkpoint: what says how it was made, and its modelling code.
MANIFEST = "lop.json"
MODELING = "modeling_lop.py"
_FLOATS = {"BF16", "F16", "F32", "F64"}
_TAKES = (
    f"LOP takes whole {' or '.join(family.name for family in FAMILIES.values())} models (model_type "
    f"{' or '.join(map(repr, FAMILIES))}) with weights in bfloat16, float16 or float32"
)
_ADAPTER = "adapter_config.json"


def check_config(folder: Path, *, quantised: bool = False) -> dict[str, Any]:
    """Looks at a folder's config alone, which is all that is there while a model is downloaded, and returns it.

    Args:
        quantised: takes one that LOP has quantised, too.

    Raises:
        LopError: it is of no family that LOP takes, or a quantised model, or an adapter; says what it is.
    """
    if (folder / _ADAPTER).is_file():
        base = _value(read_json(folder / _ADAPTER), "base_model_name_or_path")
        raise LopError(f"{folder} is an adapter of {base} ({_ADAPTER}): merge it into that model; {_TAKES}")
    if not (folder / "config.json").is_file() and any(folder.glob("*.gguf")):
        raise LopError(f"{folder} holds GGUF files, which llama.cpp runs: name what they were made from; {_TAKES}")
    if not (folder / "config.json").is_file():
        raise LopError(f"{folder} has no config.json: name a folder that holds a checkpoint; {_TAKES}")
    config = read_json(folder / "config.json")
    kind, classes = _value(config, "model_type"), _value(config, "architectures")
    family = next((family for family in FAMILIES.values() if family.model_type == kind), None)
    if family is None:
        raise LopError(f"{folder} is a model of another type, {kind!r} by its config.json ({classes}): {_TAKES}")
    known = {family.architecture, family.pruned_class}
    if isinstance(classes, list) and classes and not known & set(map(str, classes)):
        raise LopError(f"{folder} is a {classes[0]} by its config.json, no {family.architecture}: {_TAKES}")
    if (method := _quantisation(config)) and not (quantised and is_quantised(folder)):
        raise LopError(f"{folder} is quantised ({method}, by its config.json): name what it was made from; {_TAKES}")
    if refusal := family.refusal(config):
        raise LopError(f"{folder} is no {family.name} that LOP takes: {refusal}")
    return dict(config)


def is_quantised(folder: Path) -> bool:
    """Whether LOP has quantised a checkpoint, by its manifest."""
    return (folder / MANIFEST).is_file() and bool(_value(read_json(folder / MANIFEST), "quantised"))


def family_of(folder: Path) -> Family:
    """The family of a folder's model, which may be quantised.

    Raises:
        LopError: as `check_config`.
    """
    return FAMILIES[check_config(folder, quantised=True)["model_type"]]


def check_checkpoint(folder: Path, *, dense: bool = False, quantised: bool = False) -> dict[str, TensorInfo]:
    """Looks at a folder's config and headers, and returns its tensors.

    Args:
        quantised: takes what LOP has quantised, too; of each such weight what it is once it is unpacked is returned, in
            the place of the tensors that hold it.
        dense: refuses pruned checkpoints, too. Their neurons are in another order, and which of the dense model's they
            are no longer matters to any run: what is wanted smaller is pruned from the dense model again.

    Raises:
        LopError: it is none that LOP takes; says what it is.
    """
    config = check_config(folder, quantised=quantised)
    tensors = read_weights(folder) if quantised else read_tensors(folder)
    family = FAMILIES[config["model_type"]]
    for name, info in tensors.items():
        if info.dtype not in _FLOATS or name.rpartition(".")[2] not in ("weight", "bias"):
            raise LopError(f"{folder} is quantised or no plain model: it has {name} of {info.dtype}; {_TAKES}")
        if "lora_" in name or ".base_layer." in name:
            raise LopError(f"{folder} has an adapter that is not merged: {name}; {_TAKES}")
    down = down_projections(tensors)
    if not down or not any(map(family.is_tower, tensors)):
        lacks = "vision tower" if down else "decoder layers with gate_proj, up_proj and down_proj"
        raise LopError(f"{folder} has no {lacks}: {_TAKES}")
    is_uneven = _is_uneven(family, config) or len({info.shape for _, info in down}) > 1
    if dense and (is_uneven or (folder / MANIFEST).exists()):
        raise LopError(f"{folder} is pruned already: LOP prunes the dense model{_source(folder)}")
    for name, said, found in _sizes(family, config, tensors):
        if said != found:
            raise LopError(f"{folder} does not fit its config.json: {name} is {said} there, {found} in its tensors")
    return tensors


def read_weights(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a folder by their headers; of what LOP has quantised, as they are once unpacked.

    Raises:
        LopError: a file is missing or damaged.
    """
    tensors = read_tensors(folder)
    if not is_quantised(folder):
        return tensors
    return _unpacked(tensors, read_as(folder / MANIFEST, lambda manifest: int(manifest["quantised"]["bits"])))


def _unpacked(tensors: Mapping[str, TensorInfo], bits: int) -> dict[str, TensorInfo]:
    """The tensors of a quantised checkpoint, its weights as they are once unpacked: of their scales' type.

    Raises:
        LopError: a weight lacks some of the tensors that hold it.
    """
    found = dict(tensors)
    for name, packed in tensors.items():
        if not name.endswith(".weight_packed"):
            continue
        weight = name.removesuffix("_packed")
        parts = {part: found.pop(f"{weight}_{part}", None) for part in ("packed", "scale", "zero_point", "shape")}
        scale = parts["scale"]
        if scale is None or None in parts.values() or len(packed.shape) != 2:
            raise LopError(f"{packed.file} is damaged: {weight} lacks some of the tensors that hold it")
        found[weight] = replace(scale, shape=(packed.shape[0], packed.shape[1] * 32 // bits))
    return found


def _sizes(
    family: Family, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, Any, int]]:
    """The sizes that a model is built by, as the config and as the tensors say; what a config lacks is built huge."""
    text, down = family.text_config(config), [info for _, info in down_projections(tensors)]
    yield "num_hidden_layers", text.get("num_hidden_layers"), len(down)
    yield "hidden_size", text.get("hidden_size"), down[0].shape[0]
    if not _is_uneven(family, config):
        yield "intermediate_size", text.get("intermediate_size"), max(info.shape[1] for info in down)
    blocks = {block for name in tensors if (block := family.tower_block(name)) is not None}
    yield "vision_config.depth", family.vision_config(config)["depth"], len(blocks)


def _quantisation(config: Mapping[str, Any]) -> str | None:
    """The method by which a checkpoint is quantised, as its config names it."""
    for part in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if settings := part.get(key):
                loads = next((name for name in ("load_in_4bit", "load_in_8bit") if _value(settings, name)), key)
                return str(_value(settings, "quant_method") or loads)
    return None


def _is_uneven(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether a config is that of format `hf`; `save_pretrained` keeps it, and the manifest not."""
    is_said = "per_layer_config" in family.text_config(config)
    return is_said or family.pruned_class in (config.get("architectures") or [])


def _source(folder: Path) -> str:
    """Which dense model a pruned one says it is of."""
    source = _value(read_json(folder / MANIFEST), "source") if (folder / MANIFEST).is_file() else None
    return f", {source}, at any ratio" if source else " that it was made from, at any ratio"


def _value(settings: Any, name: str) -> Any:
    return settings.get(name) if isinstance(settings, dict) else None
