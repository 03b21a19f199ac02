"""Memory and time of exporting a 7B-shaped checkpoint: `python benchmarks/export.py [--gb N]`.

Makes a dense checkpoint of random bfloat16 weights in the shape of Qwen2.5-VL-7B (`--gb` below 16: the same matrices
with fewer layers and words), exports it with uneven widths in a process of its own, and copies as many bytes as the
export wrote with `cp`. Both begin with the page cache rid of their input and end when the bytes are on the disk. Rounds
alternate, so that both meet the same disk. The last line is JSON: `peak_rss_gib` (the largest of all exports) and
`time_over_cp` (the ratio of the medians).
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lop.checkpoint.export import export
from lop.model.tensors import model_size
from lop.space.allocation import Space, project
from lop.storage.files import write_json
from lop.storage.headers import read_tensors

HIDDEN, NEURONS, LAYERS, KEYS, VOCABULARY = 3584, 18_944, 28, 512, 152_064
VISION, VISION_NEURONS, VISION_LAYERS = 1280, 3420, 32
_SHARD = 4 * 10**9
_NOISE = 32 * 2**20


def main() -> None:
    """Runs the rounds and prints them."""
    parser = argparse.ArgumentParser(description="Memory and time of exporting a 7B-shaped checkpoint.")
    parser.add_argument("--gb", type=float, default=16.0, help="size of the dense checkpoint; 16 is the whole 7B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--target", type=float, default=0.3, help="share of neurons to remove")
    parser.add_argument("--format", choices=("hf", "padded"), default="hf")
    parser.add_argument("--folder", type=Path, help="where to put the files; a temporary folder if left out")
    parser.add_argument("--export", type=Path, nargs=2, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        print(json.dumps(export_once(*options.export, options.target, options.format)))
        return
    with TemporaryDirectory(dir=options.folder) as parent:
        source = Path(parent) / "dense"
        written = make_checkpoint(source, options.gb)
        print(f"{'round':>5} {'export s':>9} {'cp s':>9} {'peak RSS GiB':>13}   dense: {written / 1e9:.2f} GB")
        rounds = [one_round(number, source, options) for number in range(options.rounds)]
    exports, copies = (statistics.median(row[name] for row in rounds) for name in ("export_s", "cp_s"))
    summary = {
        "benchmark": "export",
        "dense_gb": written / 1e9,
        "written_gb": rounds[0]["written_gb"],
        "target": options.target,
        "format": options.format,
        "peak_rss_gib": max(row["peak_rss_gib"] for row in rounds),
        "export_s": exports,
        "cp_s": copies,
        "time_over_cp": exports / copies,
        "rounds": rounds,
    }
    print(json.dumps(summary))


def one_round(number: int, source: Path, options: argparse.Namespace) -> dict[str, float]:
    """One export and one copy of what it wrote."""
    out, copy = source.parent / "pruned", source.parent / "copy"
    forget(source)
    arguments = ["--export", source, out, "--target", options.target, "--format", options.format]
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    row["written_gb"] = sum(file.stat().st_size for file in out.iterdir()) / 1e9
    forget(out)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", out, copy], check=True)
    sync(copy)
    row["cp_s"] = time.perf_counter() - start
    shutil.rmtree(out)
    shutil.rmtree(copy)
    print(f"{number:>5} {row['export_s']:>9.2f} {row['cp_s']:>9.2f} {row['peak_rss_gib']:>13.3f}", flush=True)
    return row


def export_once(source: Path, out: Path, target: float, kind: Any) -> dict[str, float]:
    """Exports with a width of its own for each layer; seconds, and the process's peak resident memory."""
    size = model_size(read_tensors(source))
    space = Space(size.layers, size.neurons, 128, 0.95)
    rng = np.random.default_rng(0)
    ratios = np.clip(rng.normal(target, 0.15, space.layers), 0, 0.95)
    allocation = project(ratios, space, space.budget(target))
    order = np.argsort(rng.random((space.layers, space.neurons)), axis=1)
    start = time.perf_counter()
    export(source, out, allocation, order, about={"target": target}, format=kind)
    seconds = time.perf_counter() - start
    return {"export_s": seconds, "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def make_checkpoint(folder: Path, gb: float) -> int:
    """Writes a checkpoint of random weights of about `gb` · 10⁹ bytes; returns its tensors' bytes."""
    share = min(gb / 16, 1)
    layers = max(round(LAYERS * share), 1)
    vocabulary, vision_layers = round(VOCABULARY * share), max(round(VISION_LAYERS * share), 1)
    shapes = fixed_shapes(vocabulary, vision_layers)
    for index in range(layers):
        shapes |= layer_shapes(index)
    folder.mkdir()
    weight_map = write_shards(folder, shapes)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config(layers, vocabulary, vision_layers))
    return 2 * sum(int(np.prod(shape)) for shape in shapes.values())


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one decoder layer."""
    return {
        f"model.layers.{layer}.{name}": shape
        for name, shape in {
            "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            "self_attn.q_proj.bias": (HIDDEN,),
            "self_attn.k_proj.weight": (KEYS, HIDDEN),
            "self_attn.k_proj.bias": (KEYS,),
            "self_attn.v_proj.weight": (KEYS, HIDDEN),
            "self_attn.v_proj.bias": (KEYS,),
            "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            "mlp.gate_proj.weight": (NEURONS, HIDDEN),
            "mlp.up_proj.weight": (NEURONS, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, NEURONS),
            "input_layernorm.weight": (HIDDEN,),
            "post_attention_layernorm.weight": (HIDDEN,),
        }.items()
    }


def fixed_shapes(vocabulary: int, vision_layers: int) -> dict[str, tuple[int, ...]]:
    """Embeddings, head and vision tower."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (vocabulary, HIDDEN),
        "visual.patch_embed.proj.weight": (VISION, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": (VISION,),
        "visual.merger.mlp.0.weight": (4 * VISION, 4 * VISION),
        "visual.merger.mlp.0.bias": (4 * VISION,),
        "visual.merger.mlp.2.weight": (HIDDEN, 4 * VISION),
        "visual.merger.mlp.2.bias": (HIDDEN,),
    }
    for block in range(vision_layers):
        parts = {
            "norm1.weight": (VISION,),
            "norm2.weight": (VISION,),
            "attn.qkv.weight": (3 * VISION, VISION),
            "attn.qkv.bias": (3 * VISION,),
            "attn.proj.weight": (VISION, VISION),
            "attn.proj.bias": (VISION,),
        }
        for name, shape in {"gate_proj": (VISION_NEURONS, VISION), "up_proj": (VISION_NEURONS, VISION)}.items():
            parts |= {f"mlp.{name}.weight": shape, f"mlp.{name}.bias": shape[:1]}
        parts |= {"mlp.down_proj.weight": (VISION, VISION_NEURONS), "mlp.down_proj.bias": (VISION,)}
        shapes |= {f"visual.blocks.{block}.{name}": shape for name, shape in parts.items()}
    return shapes


def write_shards(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Writes shards of 4 GB filled from one block of noise; returns which tensor is in which file."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        count = 2 * int(np.prod(shape))
        if groups[-1] and size + count > _SHARD:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += count
    # Exponents as small weights have them: any 16 bits would hold infinities.
    values = np.random.default_rng(1).normal(0, 0.02, _NOISE // 2).astype(np.float32)
    noise = memoryview((values.view(np.uint32) >> 16).astype(np.uint16)).cast("B")
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_shard(folder / name, group, noise)
        weight_map |= dict.fromkeys(group, name)
    return weight_map


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], noise: memoryview) -> None:
    """Writes one safetensors file."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(noise)):
            file.write(noise[: end - start])


def config(layers: int, vocabulary: int, vision_layers: int) -> dict[str, Any]:
    """The published config of the 7B, flat as it is there, with this many layers and words."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": NEURONS,
        "max_position_embeddings": 128_000,
        "max_window_layers": layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 28,
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1_000_000.0,
        "sliding_window": 32_768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": vision_layers,
            "hidden_act": "silu",
            "hidden_size": VISION,
            "intermediate_size": VISION_NEURONS,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": HIDDEN,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocabulary,
    }


def forget(folder: Path) -> None:
    """Makes the kernel drop the folder's files from its cache."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync(folder: Path) -> None:
    """Waits until the folder's files are on the disk."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


if __name__ == "__main__":
    main()
