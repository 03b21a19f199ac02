"""The embedded model with a key/value head for each query head: the same function, with three groups a layer."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lop.model.find import assets

GROUPS = 3


def grouped_tiny(folder: Path) -> Path:
    """Writes the checkpoint, and returns its folder."""
    out = folder / "grouped"
    shutil.copytree(assets() / "model", out)
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["num_key_value_heads"] = GROUPS
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(out / "model.safetensors")
    for name, value in tensors.items():
        if "visual" not in name and any(f".{part}_proj." in name for part in "kv"):
            tensors[name] = torch.cat([value] * GROUPS).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def random_orders(layers: int, neurons: int) -> dict[str, np.ndarray]:
    """Some order of each layer's neurons, and of its groups."""
    random = np.random.default_rng(5)
    rows = {"order": neurons, "groups": GROUPS}
    return {name: random.permuted(np.tile(np.arange(n), (layers, 1)), axis=1) for name, n in rows.items()}
