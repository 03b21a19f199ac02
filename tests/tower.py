"""A small model with a vision tower like the published ones': patches of 14 pixels, merged 2 × 2, windows of 112."""

import json
import shutil
from pathlib import Path

import torch

from lop.model.find import assets

# llama.cpp's own bounds of an image: 8 to 4,096 tokens.
SIZE = {"shortest_edge": 8 * 28 * 28, "longest_edge": 4096 * 28 * 28}
PATCH, MERGE, BLOCKS, FULL = 14, 2, 4, [1, 3]


def make_model(folder: Path) -> Path:
    """Writes the embedded model's language model beside a random tower, and returns the folder."""
    from safetensors.torch import load_file
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    source = assets() / "model"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= {
        "patch_size": PATCH, "spatial_merge_size": MERGE, "window_size": 112, "depth": BLOCKS,
        "fullatt_block_indexes": FULL, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).to(torch.bfloat16)
    language = {name: value for name, value in load_file(source / "model.safetensors").items() if "visual." not in name}
    names = {name.removeprefix("model."): name for name in model.state_dict()}
    renamed = {
        next(names[known] for known in (bare, f"language_model.{bare}") if known in names): value
        for bare, value in ((name.removeprefix("model."), value) for name, value in language.items())
    }
    model.load_state_dict(renamed, strict=False)
    model.save_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    for part in ("image_processor", "video_processor"):
        if part in settings:
            settings[part] |= {"patch_size": PATCH, "merge_size": MERGE, "size": SIZE}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder
