"""Checkpoints of models from which whole layers were removed: ordinary ones, with fewer layers."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor

from lop.checkpoint.shards import Cut
from lop.checkpoint.writing import Parts, companions, write_checkpoint
from lop.model.backbone import Backbone, Heads, Layer
from lop.model.dtypes import DTYPES
from lop.model.elastic import ElasticFfn
from lop.model.families.family import Family
from lop.model.families.lean import projections
from lop.model.sources import check_checkpoint, family_of
from lop.storage.files import disk_errors, read_json
from lop.storage.headers import TensorInfo, read_header
from lop.storage.location import Location

_LAYER = re.compile(r"((?:^|.*\.)layers\.)(\d+)\.(.+)")


def export_layers(
    source: Path,
    out: str | Path | Location,
    dense: Backbone,
    reshaped: Backbone,
    places: Sequence[int],
    *,
    about: Mapping[str, Any],
    scratch: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes the checkpoint of a backbone with fewer layers; appears whole or not at all.

    Its config is the dense one's, but for the number of layers and what stands there for each of them. Any loader takes
    it, so its format is called `padded`, which is LOP's name for that.

    Args:
        source: the dense checkpoint.
        dense, reshaped: backbones; a layer of the latter that is none of the former's is written as it is there.
        places: [layers of `reshaped`], the layer of the dense model that each stands in the place of.
        about: what the manifest is to say of where it comes from.
        scratch: where new weights wait until they are written; by default the system's place for such files.
        progress: called with the bytes written so far and in all.

    Returns:
        The manifest.

    Raises:
        LopError: the source is no dense checkpoint that LOP takes, or damaged, or `out` is there already.
        OSError: the disk is full or read-only. After any error nothing is left behind.
    """
    tensors, family = check_checkpoint(source, dense=True), family_of(source)
    config = _shortened(read_json(source / "config.json"), places, len(dense.layers))
    known = {id(layer) for layer in dense.layers}
    changed = {place: layer for place, layer in zip(places, reshaped.layers) if id(layer) not in known}
    widths = [cast(ElasticFfn, layer.ffn).neurons for layer in reshaped.layers]
    layers = {"kept": list(places), "of": len(dense.layers)}
    manifest = {
        **about, "format": "padded", "widths": widths, "neurons": widths[0], "padding_bytes": 0, "layers": layers
    }  # fmt: skip
    with TemporaryDirectory(prefix="lop-layers-", dir=scratch) as folder:
        new = _written(tensors, family, changed, reshaped, Path(folder))
        cuts = [(name, Cut(info, info.shape)) for name, info in _renumbered({**tensors, **new}, family, places)]
        parts = Parts(cuts, config, manifest, companions(source))
        return write_checkpoint(Location.parse(out), parts, source, family, scratch=scratch, progress=progress)


def layer_tensors(layer: Layer) -> dict[str, Tensor]:
    """All tensors of a layer, by the names that transformers gives them within it.

    Args:
        layer: with an `ElasticFfn`.
    """
    ffn, heads = cast(ElasticFfn, layer.ffn), layer.heads
    weights = projections(heads)
    biases = projections(Heads(heads.qkv_bias, heads.qkv_bias, heads.out, heads.size))
    return {
        "input_layernorm.weight": layer.attention_norm,
        **{f"self_attn.{name}_proj.weight": weight for name, weight in zip("qkv", weights)},
        **{f"self_attn.{name}_proj.bias": bias for name, bias in zip("qkv", biases)},
        "self_attn.o_proj.weight": heads.out,
        "post_attention_layernorm.weight": layer.ffn_norm,
        "mlp.gate_proj.weight": ffn.gate,
        "mlp.up_proj.weight": ffn.up,
        "mlp.down_proj.weight": ffn.down,
    }


def _shortened(dense: Mapping[str, Any], places: Sequence[int], layers: int) -> dict[str, Any]:
    """The config with as many layers as there are places."""
    config = copy.deepcopy(dict(dense))
    for text in (config, config.get("text_config") or {}):  # A flat config is the backbone's, too.
        if "num_hidden_layers" in text:
            text["num_hidden_layers"] = len(places)
        if len(text.get("layer_types") or ()) == layers:
            text["layer_types"] = [text["layer_types"][place] for place in places]
    return config


def _written(
    tensors: Mapping[str, TensorInfo], family: Family, changed: Mapping[int, Layer], backbone: Backbone, folder: Path
) -> dict[str, TensorInfo]:
    """Writes the tensors of changed layers to files of the folder, and says where they are, by the source's names."""
    found: dict[str, TensorInfo] = {}
    for place, layer in changed.items():
        new = layer_tensors(layer)
        named = {
            name: new[part[2]].detach().to("cpu", DTYPES[tensors[name].dtype]).contiguous()
            for name in tensors
            if (part := _parted(name, family)) and part[1] == place and part[2] in new
        }
        file = folder / f"{place:05d}.safetensors"
        with disk_errors(file):
            save_file(named, file)
        found |= read_header(file)
    return found


def _renumbered(
    tensors: Mapping[str, TensorInfo], family: Family, places: Sequence[int]
) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors that stay, by their names in the new checkpoint."""
    moved = {place: index for index, place in enumerate(places)}
    for name, info in tensors.items():
        part = _parted(name, family)
        if part is None:
            yield name, info
        elif part[1] in moved:
            yield f"{part[0]}{moved[part[1]]}.{part[2]}", info


def _parted(name: str, family: Family) -> tuple[str, int, str] | None:
    """Of a tensor of the language backbone's layers: what stands before the layer's number, it, and what after."""
    found = None if family.is_tower(name) else _LAYER.fullmatch(name)
    return (found.group(1), int(found.group(2)), found.group(3)) if found else None
