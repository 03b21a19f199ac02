"""What may be named in place of a dense Qwen2.5-VL: every entrance says in one line what it is, and builds nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lop
from lop.checkpoint.export import export
from lop.checkpoint.inspection import inspect
from lop.checkpoint.recovery import recover_checkpoint
from lop.cli import main
from lop.errors import LopError
from lop.model.families.remote_qwen2_5_vl import LopQwen2_5_VLForConditionalGeneration
from lop.model.find import assets, find_model
from lop.model.sources import check_checkpoint
from lop.model.tensors import model_size
from lop.space.allocation import Allocation
from lop.storage.headers import read_tensors

MODEL = assets() / "model"
SIZE = model_size(read_tensors(MODEL))
ORDER = np.tile(np.arange(SIZE.neurons), (SIZE.layers, 1))
HALF = Allocation((SIZE.neurons // 2,) * SIZE.layers)
UNEVEN = Allocation(tuple(SIZE.neurons // 2 + 8 * (layer % 3 - 1) for layer in range(SIZE.layers)))
DOWN = next(name for name in read_tensors(MODEL) if name.endswith("layers.3.mlp.down_proj.weight"))
Change = Callable[[Path], None]


def config(**changes: Any) -> Change:
    """Changes entries of the config; None takes one away."""

    def change(folder: Path) -> None:
        there = json.loads((folder / "config.json").read_text())
        kept = {name: value for name, value in {**there, **changes}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def text_config(**changes: Any) -> Change:
    return config(text_config={**json.loads((MODEL / "config.json").read_text())["text_config"], **changes})


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def rewrite(folder: Path) -> None:
        save_file(change(load_file(MODEL / "model.safetensors")), folder / "model.safetensors")

    return rewrite


def stored_as(name: str, dtype: torch.dtype) -> Change:
    return tensors(lambda found: {**found, name: torch.zeros(found[DOWN].shape).to(dtype)})


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}))


def adapter_alone(folder: Path) -> None:
    adapter(folder)
    (folder / "config.json").unlink()


def quantised(method: str) -> Change:
    return config(quantization_config={"quant_method": method, "bits": 4})


OTHERS: dict[str, tuple[Change, str]] = {
    "another type": (config(model_type="qwen3_vl"), "another type, 'qwen3_vl'"),
    "another family's": (config(model_type="qwen2_vl"), "is a Qwen2_5_VLFor.*, no Qwen2VLForConditionalGeneration"),
    "text only": (config(model_type="qwen2", architectures=["Qwen2ForCausalLM"]), "'qwen2'.*Qwen2ForCausalLM"),
    "no type": (config(model_type=None), "another type, None"),
    "not a config": (lambda folder: (folder / "config.json").write_text("[]"), "another type, None"),
    "another head": (config(architectures=["Qwen2_5_VLForTokenClassification"]), "is a Qwen2_5_VLForToken"),
    **{method: (quantised(method), f"quantised \\({method}") for method in ("awq", "gptq", "fp8", "torchao")},
    "another activation": (text_config(hidden_act="gelu"), "activation is 'gelu'.*Qwen2.5-VL has 'silu'"),
    "a window": (text_config(use_sliding_window=True), "sliding window \\(use_sliding_window\\)"),
    "bitsandbytes": (config(quantization_config={"load_in_4bit": True}), "quantised \\(load_in_4bit"),
    "compressed": (config(compression_config={"quant_method": "compressed-tensors"}), "quantised \\(compressed"),
    "within the text": (text_config(quantization_config={"quant_method": "hqq"}), "quantised \\(hqq"),
    "int8 weights": (stored_as(DOWN, torch.int8), f"{DOWN} of I8"),
    "fp8 weights": (stored_as(DOWN, torch.float8_e4m3fn), f"{DOWN} of F8_E4M3"),
    "packed weights": (stored_as(DOWN.replace("weight", "qweight"), torch.int32), "qweight of I32"),
    "scales": (stored_as(DOWN.replace("weight", "weight_scale"), torch.float32), "weight_scale of F32"),
    "an adapter": (adapter_alone, "adapter of Qwen/Qwen2.5-VL-3B-Instruct"),
    "an adapter beside": (adapter, "adapter of Qwen/Qwen2.5-VL-3B-Instruct"),
    "not merged": (stored_as(DOWN.replace("weight", "lora_A.weight"), torch.float32), "not merged"),
    "no vision": (tensors(lambda found: {n: t for n, t in found.items() if "visual" not in n}), "no vision tower"),
    "no layers": (tensors(lambda found: {n: t for n, t in found.items() if ".mlp." not in n}), "no decoder layers"),
    "no sizes": (config(text_config=None), "num_hidden_layers is None there"),
    "other layers": (text_config(num_hidden_layers=80), "num_hidden_layers is 80 there"),
    "other widths": (text_config(intermediate_size=29568), "intermediate_size is 29568 there"),
    "other tower": (config(vision_config=None), "vision_config.depth is 32 there"),
}  # fmt: skip


def command(*arguments: str) -> Callable[[Path, Path], None]:
    """A command on a model, with the embedded one's settings; what it complains of is raised."""

    def run(folder: Path, out: Path) -> None:
        run_folder = str(assets() / "run") if "--target" in arguments else str(out / "run")
        placed = [argument.format(out=out / "pruned") for argument in arguments]
        assert main([*placed, "--model", str(folder), "--config", "tiny", "--run", run_folder]) == 2

    return run


PRUNING: dict[str, Callable[[Path, Path], Any]] = {
    "calibrate": command("calibrate"),
    "search": command("search", "--workers", "0"),
    "predict": command("predict", "--target", "0.5"),
    "prune": command("prune", "--target", "0.5", "--out", "{out}"),
    "export": lambda folder, out: export(folder, out / "pruned", HALF, ORDER, about={}),
    "recover": lambda folder, out: recover_checkpoint(
        folder, HALF, "bias", out, order=ORDER, means=ORDER * 0.0, samples=[], batch_tokens=100
    ),
}
OPENING: dict[str, Callable[[Path, Path], Any]] = {
    "inspect": lambda folder, out: inspect(folder),
    "load": lambda folder, out: lop.load(folder),
}


def complaint(enter: Callable[[Path, Path], Any], folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line in which an entrance refuses a folder."""
    out.mkdir(exist_ok=True)
    try:
        enter(folder, out)
    except LopError as error:
        line = str(error)
    else:
        line = capsys.readouterr().err.strip()
    assert line
    assert "\n" not in line
    assert not any(out.rglob("*.safetensors"))
    return line


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_qwen_is_told_at_every_entrance(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "model")
    change, words = OTHERS[kind]
    change(folder)
    monkeypatch.setattr(LopQwen2_5_VLForConditionalGeneration, "__init__", None)  # Nothing may be built.
    lines = {complaint(enter, folder, tmp_path / "out", capsys) for enter in (PRUNING | OPENING).values()}
    (line,) = {line.removeprefix("lop: ").removeprefix("error: ") for line in lines}
    with pytest.raises(LopError, match=words):
        raise LopError(line)
    assert str(folder) in line


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of each kind that LOP or, after it, transformers writes."""
    folder = tmp_path_factory.mktemp("pruned")
    export(MODEL, folder / "uneven", UNEVEN, ORDER, about={"source": "someone/dense"})
    export(MODEL, folder / "uniform", HALF, ORDER, about={})
    export(MODEL, folder / "padded", UNEVEN, ORDER, about={}, format="padded")
    lop.load(folder / "uniform").save_pretrained(folder / "saved again")
    return folder


@pytest.mark.parametrize("kind", ["uneven", "uniform", "padded", "saved again"])
def test_a_pruned_model_opens_and_is_not_pruned_again(
    kind: str, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(pruned / kind).damage == ""
    assert check_checkpoint(pruned / kind)
    for name, enter in PRUNING.items():
        line = complaint(enter, pruned / kind, tmp_path / "out", capsys)
        assert "is pruned already: LOP prunes the dense model" in line, name
        assert ("someone/dense" in line) == (kind == "uneven")


def test_a_hub_model_is_refused_before_its_weights_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append(options)
        shutil.copy(MODEL / "config.json", tmp_path)
        config(model_type="qwen3_vl")(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(LopError, match="another type, 'qwen3_vl'"):
        find_model("someone/else")
    (options,) = asked
    assert options == {"allow_patterns": ["config.json", "adapter_config.json"]}


def test_a_config_that_leaves_out_the_usual_depth_of_the_tower_is_right(tmp_path: Path) -> None:
    """As transformers up to 4.51 saves it."""
    folder = shutil.copytree(MODEL, tmp_path / "model")
    tower = {f"visual.blocks.{block}.norm1.weight": torch.zeros(4) for block in range(32)}
    tensors(lambda found: {n: t for n, t in found.items() if "visual" not in n} | tower)(folder)
    config(vision_config={"hidden_size": 4})(folder)
    assert tower.keys() < check_checkpoint(folder).keys()
