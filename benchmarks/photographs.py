"""Memory of `lop calibrate` and `lop prune` with photographs: `python benchmarks/photographs.py --shape 3b`.

Makes a checkpoint of random bfloat16 weights in the shape of Qwen2.5-VL-3B or -7B and in the hub's layout (flat config,
the first tensor names, shards), and samples with photographs of 12 megapixels (4000×3000, JPEG), of each of which the
processor makes 15,301 tokens. Then it runs both commands as a user would, each in a process of its own. The last line
is JSON: for each command its seconds, its peak resident memory (as the kernel counts it, mapped files included), the
peak of what belongs to it alone, and by how much the former exceeds the weights: `calibrate` is allowed 3 GiB.

On a CPU a photograph takes 150 TFLOP in the vision tower and, with the 3B, 100 in the language model: `calibrate`
computes both once, `prune` the former once and the latter thrice. `--layers` and `--blocks` cut the model to its first
decoder layers and blocks of the tower, whose widths stay: the peaks beside the weights are nearly the same (each layer
adds 10 MiB with the 3B and 32 with the 7B), in a fraction of the time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from lop.model.find import assets
from lop.predictor.networks import build
from lop.predictor.predictor import Predictor
from lop.run.config import load_config
from lop.run.run import Run
from lop.storage.files import write_json
from lop.storage.headers import read_tensors

GIB = 2**30
ALLOWED = 3.0  # GiB that `calibrate` may take beside the weights.
_SHARD = 2 * 10**9
_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
        "mrope_section": [8, 12, 12],
        "vision": {"depth": 2, "hidden_size": 160, "intermediate_size": 428, "num_heads": 2},
    },
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "mrope_section": [16, 24, 24],
        "vision": _VISION,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
        "mrope_section": [16, 24, 24],
        "vision": _VISION,
    },
}


def main() -> None:
    """Makes model and samples, runs both commands and prints what they took."""
    parser = argparse.ArgumentParser(description="Memory of calibrate and prune with photographs of 12 megapixels.")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="3b")
    parser.add_argument("--photographs", type=int, default=2, metavar="N", help="in the calibration samples")
    parser.add_argument("--target", default="0.3", help="share of neurons to remove")
    parser.add_argument("--layers", type=int, help="decoder layers; as many as the shape has if left out")
    parser.add_argument("--blocks", type=int, help="blocks of the vision tower, the last one with full attention")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's")
    parser.add_argument("--max-pixels", type=int, help="images.max_pixels; all pixels if left out")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--commands", nargs="+", choices=("calibrate", "prune"), default=["calibrate", "prune"])
    parser.add_argument("--folder", type=Path, help="where to put the files; a temporary folder if left out")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    shape = {**shape, "num_hidden_layers": options.layers or shape["num_hidden_layers"]}
    shape["vision"] = {**shape["vision"], "depth": options.blocks or shape["vision"]["depth"]}
    with TemporaryDirectory(dir=options.folder) as parent:
        folder = Path(parent)
        make_checkpoint(folder / "model", shape)
        make_samples(folder / "samples", options.photographs)
        config = make_config(folder, options)
        weights = sum(info.bytes for info in read_tensors(folder / "model").values()) / GIB
        print(f"{options.shape}: {weights:.2f} GiB of weights, {options.photographs} photographs", flush=True)
        common = ["--config", str(config), "--run", str(folder / "run")]
        commands = {
            "calibrate": ["calibrate", *common],
            "prune": ["prune", *common, "--target", options.target, "--out", str(folder / "out")],
        }
        summary: dict[str, Any] = {
            "benchmark": "photographs",
            **{name: getattr(options, name) for name in ("shape", "layers", "blocks", "photographs")},
            **{name: getattr(options, name) for name in ("threads", "dtype", "max_pixels")},
            "weights_gib": weights,
        }
        for name in options.commands:
            if name == "prune":
                make_predictor(config, folder / "run")
            summary[name] = found = measure([sys.executable, "-m", "lop", *commands[name]])
            found["over_weights_gib"] = found["peak_rss_gib"] - weights
            print(f"{name:>9}: {', '.join(f'{key} {value:.2f}' for key, value in found.items())}", flush=True)
        if "calibrate" in summary:
            summary["is_within"] = summary["calibrate"]["over_weights_gib"] < ALLOWED
        print(json.dumps(summary))


def measure(command: list[str]) -> dict[str, float]:
    """Runs a command; its seconds, and the peaks of its memory in GiB.

    Raises:
        SystemExit: it failed.
    """
    start, private = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        private = max(private, _anonymous_kib(process.pid))
        time.sleep(0.05)
    if status:
        raise SystemExit(f"{' '.join(command)} failed: exit code {os.waitstatus_to_exitcode(status)}")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_rss_gib": usage.ru_maxrss / 2**20, "peak_private_gib": private / 2**20}


def _anonymous_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0  # It has just ended.
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def make_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """Writes a checkpoint of random weights, shard by shard: no more than one is in memory."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(assets() / "model" / name, folder)
    write_json(folder / "config.json", hub_config(shape))
    write_json(folder / "preprocessor_config.json", PROCESSOR)
    with init_empty_weights():
        network = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder))
    random = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, parameter in network.named_parameters():
        if name == "lm_head.weight" and shape["tie_word_embeddings"]:
            continue
        shard[hub_name(name)] = random_weights(name, parameter.shape, random)
        if sum(tensor.nbytes for tensor in shard.values()) > _SHARD:
            flush()
    flush()
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def hub_name(name: str) -> str:
    """A parameter's name as the checkpoints on the hub have it."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def random_weights(name: str, shape: torch.Size, random: torch.Generator) -> torch.Tensor:
    """Ones for norms, noise for everything else; a large matrix repeats the same thousand rows."""
    if (len(shape) == 1 and "norm" in name) or name.endswith("ln_q.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    noise = torch.randn(min(shape[0], 1009), *shape[1:], generator=random).mul_(0.02).bfloat16()
    return noise.repeat(-(-shape[0] // len(noise)), *([1] * (len(shape) - 1)))[: shape[0]].contiguous()


def hub_config(shape: dict[str, Any]) -> dict[str, Any]:
    """A published config of the family, flat as it is there, with this shape and the embedded model's tokens."""
    text = {key: value for key, value in shape.items() if key not in ("vision", "mrope_section")}
    embedded = json.loads((assets() / "model" / "config.json").read_text())
    tokens = {key: value for key, value in embedded.items() if key.endswith("_token_id")}
    depth = shape["vision"]["depth"]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": embedded["text_config"]["eos_token_id"],
        **tokens,
        **text,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 128_000,
        "max_window_layers": 70,
        "model_type": "qwen2_5_vl",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": shape["mrope_section"]},
        "sliding_window": 32_768,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            **shape["vision"],
            "hidden_act": "silu",
            "in_chans": 3,
            "out_hidden_size": shape["hidden_size"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31] if depth == 32 else [depth - 1],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }


# As published beside the 3B and the 7B.
PROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12_845_056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}


def make_samples(folder: Path, photographs: int) -> None:
    """Writes the three sets, of which calibration alone has photographs."""
    folder.mkdir()
    random = np.random.default_rng(0)
    sets = {"calibration": [photograph(random) for _ in range(photographs)]}
    sets |= {name: [photograph(random, 160, 120)] for name in ("reward", "test")}
    for name, images in sets.items():
        rows = [
            {"image": image, "form": "yes_no", "question": "Is this a photograph?", "options": [], "answer": "yes"}
            for image in images
        ]
        texts = [pa.field(column, pa.string()) for column in ("form", "question", "answer")]
        schema = pa.schema([pa.field("image", pa.binary()), pa.field("options", pa.list_(pa.string())), *texts])
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{name}.parquet")


def photograph(random: np.random.Generator, width: int = 4000, height: int = 3000) -> bytes:
    """A JPEG with areas of colour, blurred edges and a camera's noise."""
    coarse = Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    picture = coarse.resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(3))
    noisy = np.asarray(picture, dtype=np.int16) + random.integers(-6, 7, (height, width, 3), dtype=np.int16)
    file = BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_config(folder: Path, options: argparse.Namespace) -> Path:
    """A settings file for the model and the samples."""
    path = folder / "photographs.yaml"
    settings: dict[str, Any] = {
        "model": str(folder / "model"),
        "samples": str(folder / "samples"),
        "device": "cpu",
        "dtype": options.dtype,
        "threads": options.threads,
        "recovery": "refit",
        "images": {"max_pixels": options.max_pixels},
        "search": {"targets": {"first": 0.3, "last": 0.3, "step": 0.1}},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def make_predictor(config: Path, folder: Path) -> None:
    """Puts an untrained network into the run: `prune` needs a predictor, and its memory does not depend on which."""
    run = Run(load_config(config), folder)
    weights = {name: tensor.numpy() for name, tensor in build("mlp", run.space.layers).state_dict().items()}
    Predictor("mlp", weights, run.space, run.size, {"model": run.model_fingerprint}).save(run.predictor_folder)


if __name__ == "__main__":
    main()
