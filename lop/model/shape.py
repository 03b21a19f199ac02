"""The shape of a checkpoint's model, as its configs say: what a run's memory depends on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lop.model.families.registry import FAMILIES
from lop.model.sources import check_config
from lop.space.memory import Shape, Tower
from lop.storage.files import read_as, read_json

# What transformers' processor makes of an image by default, at least and at most.
_PIXELS = (56 * 56, 28 * 28 * 1280)


def read_shape(folder: Path, item_bytes: int) -> Shape:
    """The shape of a local checkpoint's model, dense or pruned.

    Args:
        item_bytes: that a number of its weights takes.

    Raises:
        LopError: the folder's configs are missing or damaged, or of no model that LOP takes.
    """
    check_config(folder)
    return read_as(folder / "config.json", lambda config: _shape(config, folder, item_bytes))


def _shape(config: Mapping[str, Any], folder: Path, item_bytes: int) -> Shape:
    family = FAMILIES[config["model_type"]]
    text = family.text_config(config)
    vision = family.vision_config(config)
    heads = text["num_attention_heads"]
    head = text.get("head_dim") or text["hidden_size"] // heads
    hidden, neurons, matrices = family.tower_widths(vision)
    least, most = _pixels(folder)
    channels = vision.get("in_chans", vision["in_channels"])
    return Shape(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        vocabulary=text.get("vocab_size") or config["vocab_size"],
        queries=heads * head,
        keys=text["num_key_value_heads"] * head,
        head=head,
        item=item_bytes,
        tower=Tower(
            hidden=hidden,
            neurons=neurons,
            head=hidden // vision["num_heads"],
            matrices=matrices,
            patch=vision["patch_size"],
            patch_numbers=channels * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
            merge=vision["spatial_merge_size"],
            least=least,
            most=most,
        ),
    )


def read_processor(folder: Path) -> dict[str, Any]:
    """Of a checkpoint's processor, how images are scaled: where transformers looks first. Empty if it is nowhere.

    Raises:
        LopError: a file is damaged.
    """
    for name, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        if (folder / name).is_file():
            found = read_json(folder / name)
            if found := found.get(part) if part else found:
                return dict(found)
    return {}


def _pixels(folder: Path) -> tuple[int, int]:
    """The least and the most that the folder's processor makes of an image."""
    settings = read_processor(folder)
    size = settings.get("size") or {}
    least = settings.get("min_pixels") or size.get("shortest_edge") or _PIXELS[0]
    return least, settings.get("max_pixels") or size.get("longest_edge") or _PIXELS[1]
