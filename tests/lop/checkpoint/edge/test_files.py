"""What stands in GGUF files, read back by the library; what is refused, and what faults leave behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file

import lop.checkpoint.edge.files
from lop.checkpoint.edge.types import KINDS
from lop.checkpoint.export import convert, export, verify
from lop.checkpoint.footprint import Footprint
from lop.checkpoint.formats import FORMATS
from lop.checkpoint.inspection import inspect
from lop.cli import main
from lop.errors import CancelledError, LopError
from lop.model.tensors import model_size
from lop.space.allocation import Allocation, Space, project
from lop.space.size import Target
from lop.storage.headers import read_header, read_tensors
from tests.lop.checkpoint.edge.conftest import MODEL, ORDER, SPACE

GGUF = [name for name, layout in FORMATS.items() if layout.gguf]
# How far a number may be from what it was, as a share of the largest of its block of 32.
ROUNDING = {"f32": 0, "f16": 2**-11, "q8_0": 1 / 225, "q4_1": 1 / 14, "q4_0": 1 / 7.9}
LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def read(file: Path) -> tuple[dict[str, Any], dict[str, tuple[str, np.ndarray]]]:
    """The keys, and each tensor's type with its numbers."""
    reader = GGUFReader(file)
    keys = {name: found.contents() for name, found in reader.fields.items()}
    tensors = {t.name: (t.tensor_type.name.lower(), dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return keys, tensors


def checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """Its tensors in float32, by names without the language model's prefixes."""
    found = load_file(folder / "model.safetensors")
    return {
        name.removeprefix("model.").removeprefix("language_model."): value.float().numpy()
        for name, value in found.items()
    }


def expect_close(found: np.ndarray, wanted: np.ndarray, kind: str) -> None:
    assert found.shape == wanted.shape
    block = KINDS[kind].block
    rows = np.abs(wanted.reshape(-1, block)) if block > 1 else np.abs(wanted.reshape(-1, 1))
    # Below its smallest normal number, float16 is as coarse as that is small.
    bound = np.repeat(rows.max(axis=1) * ROUNDING[kind], rows.shape[1]).reshape(wanted.shape) + 2**-24
    assert (np.abs(found - wanted) <= bound).all()


@pytest.mark.parametrize("form", GGUF)
def test_every_tensor_is_the_checkpoints(form: str, pruned: Path, allocation: Allocation, tmp_path: Path) -> None:
    manifest = convert(pruned, tmp_path / "out", format=form)
    kind, stored = FORMATS[form].gguf, FORMATS[form].stored(allocation.widths)
    assert kind
    keys, tensors = read(tmp_path / "out" / f"model-{kind}.gguf")
    source = checkpoint(pruned)
    wanted = {"token_embd.weight": source["embed_tokens.weight"], "output_norm.weight": source["norm.weight"]}
    for layer, width in enumerate(stored):
        for part, ours in LAYER.items():
            for end in ("weight", "bias"):
                value = source.get(f"layers.{layer}.{part}.{end}")
                if value is None:
                    continue
                if ours.startswith("ffn_") and ours != "ffn_norm":
                    axis = 1 if ours == "ffn_down" else 0
                    lacking = [(0, 0), (0, 0)]
                    lacking[axis] = (0, width - value.shape[axis])
                    value = np.pad(value, lacking)
                wanted[f"blk.{layer}.{ours}.{end}"] = value
    assert tensors.keys() == wanted.keys()
    for name, (type_, found) in tensors.items():
        expect_close(found, wanted[name], type_)
        row = wanted[name].shape[-1]
        if wanted[name].ndim == 1:
            assert type_ == "f32"
        elif row % KINDS[kind].block:
            assert type_ == "f16"
        else:
            assert type_ == (kind if name != "token_embd.weight" else KINDS[kind].around)
    length = keys["qwen2vl.feed_forward_length"]
    assert length == (stored[0] if len(set(stored)) == 1 else stored)
    assert ("true" in form) == (len(set(stored)) > 1)
    assert manifest["gguf"]["bytes"] == sum(reader_bytes(tmp_path / "out" / f"model-{kind}.gguf"))
    assert manifest["widths"] == list(allocation.widths)
    assert manifest["source"] == "tiny"
    padding = sum(w - k for w, k in zip(stored, allocation.widths))
    assert (manifest["padding_bytes"] > 0) == (padding > 0)


def reader_bytes(file: Path) -> list[int]:
    return [int(tensor.n_bytes) for tensor in GGUFReader(file).tensors]


def test_keys_are_what_llama_cpp_asks_for(pruned: Path, tmp_path: Path) -> None:
    convert(pruned, tmp_path / "out")
    keys, _ = read(tmp_path / "out" / "model-f16.gguf")
    text = json.loads((MODEL / "config.json").read_text())["text_config"]
    expected = {
        "general.architecture": "qwen2vl",
        "general.name": "tiny",
        "qwen2vl.block_count": text["num_hidden_layers"],
        "qwen2vl.context_length": text["max_position_embeddings"],
        "qwen2vl.embedding_length": text["hidden_size"],
        "qwen2vl.attention.head_count": text["num_attention_heads"],
        "qwen2vl.attention.head_count_kv": text["num_key_value_heads"],
        "qwen2vl.rope.dimension_sections": [*text["rope_parameters"]["mrope_section"], 0],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (MODEL / "chat_template.jinja").read_text(),
    }
    assert {name: keys[name] for name in expected} == expected
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    tokens = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    tokens |= {added["id"]: added["content"] for added in tokenizer["added_tokens"]}
    assert keys["tokenizer.ggml.tokens"] == [tokens[index] for index in range(text["vocab_size"])]
    assert len(keys["tokenizer.ggml.merges"]) == len(tokenizer["model"]["merges"])
    assert [keys["tokenizer.ggml.token_type"][index] for index in (0, 6, 100)] == [3, 3, 1]


def test_the_tower_is_written_in_float16(towered: Path, tmp_path: Path) -> None:
    manifest = convert(towered, tmp_path / "out", format="gguf-q4_0")
    assert "without_tower" not in manifest["gguf"]
    keys, tensors = read(tmp_path / "out" / "mmproj-f16.gguf")
    source = checkpoint(towered)
    assert keys["clip.projector_type"] == "qwen2.5vl_merger"
    assert keys["clip.vision.n_wa_pattern"] == 2
    assert keys["clip.vision.patch_size"] == 14
    patches = source["visual.patch_embed.proj.weight"]
    expect_close(tensors["v.patch_embd.weight"][1], patches[:, :, 0], "f16")
    expect_close(tensors["v.patch_embd.weight.1"][1], patches[:, :, 1], "f16")
    for block in range(4):
        whole = source[f"visual.blocks.{block}.attn.qkv.weight"]
        parts = [tensors[f"v.blk.{block}.attn_{part}.weight"][1] for part in "qkv"]
        expect_close(np.concatenate(parts), whole, "f16")
        bias = [tensors[f"v.blk.{block}.attn_{part}.bias"][1] for part in "qkv"]
        np.testing.assert_array_equal(np.concatenate(bias), source[f"visual.blocks.{block}.attn.qkv.bias"])
    expect_close(tensors["mm.2.weight"][1], source["visual.merger.mlp.2.weight"], "f16")
    # All of it, and nothing twice: what a checkpoint's tower holds, the files hold.
    counted = sum(value[1].size for value in tensors.values())
    assert counted == sum(value.size for name, value in source.items() if name.startswith("visual."))


def test_a_tower_that_llama_cpp_cannot_compute_is_left_out_and_said_so(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["convert", str(pruned), "--out", str(tmp_path / "out")]) == 0
    assert "merges 4 × 4 patches" in caplog.text
    capsys.readouterr()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "lop.json", "model-f16.gguf"]
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "not there: its vision tower merges" in " ".join(capsys.readouterr().out.split())


def test_converting_a_padded_checkpoint_drops_its_zeros(pruned: Path, allocation: Allocation, tmp_path: Path) -> None:
    export(MODEL, tmp_path / "padded", allocation, ORDER, about={"source": "tiny"}, format="padded")
    for source, out in ((pruned, "a"), (tmp_path / "padded", "b")):
        convert(source, tmp_path / out, format="gguf-true")
    a, b = (read(tmp_path / out / "model-f16.gguf") for out in "ab")
    assert a[0] == b[0]
    assert all(np.array_equal(a[1][name][1], b[1][name][1]) for name in a[1])


def test_pruning_and_converting_write_the_same_file(pruned: Path, allocation: Allocation, tmp_path: Path) -> None:
    about = {"source": "tiny", "version": "1"}
    made = export(MODEL, tmp_path / "pruned", allocation, ORDER, about=about, format="gguf-q8_0")
    converted = convert(pruned, tmp_path / "converted", format="gguf-q8_0")
    assert made["sha256"]["model-q8_0.gguf"] == converted["sha256"]["model-q8_0.gguf"]
    assert verify(tmp_path / "pruned")["gguf"] == converted["gguf"]


@pytest.mark.parametrize("form", GGUF)
def test_inspect_tells_what_it_is_and_finds_damage(
    form: str, pruned: Path, allocation: Allocation, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(pruned, out, format=form)
    found = inspect(out)
    kind = FORMATS[form].gguf
    file = out / f"model-{kind}.gguf"
    assert (found.format, found.widths, found.damage) == (form, allocation.widths, "")
    assert found.stored == tuple(FORMATS[form].stored(allocation.widths))
    assert found.bytes == sum(reader_bytes(file))
    assert found.parameters == sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    assert f"{file.name} is not what was written" in inspect(out).damage


@pytest.mark.parametrize("form", GGUF)
@pytest.mark.parametrize("asked", [{"bytes": 1_400_000}, {"parameters": 750_000}, {"ratio": 0.5}])
def test_targets_are_kept_and_told_before(form: str, asked: dict[str, Any], tmp_path: Path) -> None:
    target = Target(**asked)
    footprint = Footprint(model_size(read_tensors(MODEL)), form, source=MODEL)
    space = Space(SPACE.layers, SPACE.neurons, 32, 0.95) if "true" in form else SPACE

    def predict(budget: int) -> Allocation:
        return project(np.linspace(0.1, 0.9, space.layers), space, budget)

    allocation = footprint.allocate(target, space, predict)
    manifest = export(MODEL, tmp_path / "out", allocation, ORDER, about={}, format=form)
    facts = manifest["gguf"]
    assert facts["bytes"] == footprint.bytes(allocation.widths) <= asked.get("bytes", 10**9)
    assert facts["parameters"] == footprint.parameters(allocation.widths) <= asked.get("parameters", 10**9)
    if "bytes" in asked:
        more = allocation.budget + space.granularity * (1 if "true" in form else space.layers)
        if form == "gguf":
            assert footprint.bytes([more // space.layers] * space.layers) > asked["bytes"]


def test_bytes_that_would_depend_on_the_spread_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--model", "tiny", "--bytes", "1400000", "--format", "gguf-true-q8_0"]) == 2
    assert "blocks of 32 neurons" in capsys.readouterr().err


def test_what_cannot_be_written_is_refused_in_one_line(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        return said[0]

    assert "no place for a bias" in refused("prune", "--target", "0.3", "--recovery", "bias", "--format", "gguf")
    quantised = shutil.copytree(pruned, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    (quantised / "lop.json").unlink()
    assert "is quantised (gptq" in refused("convert", str(quantised))
    done = tmp_path / "done"
    convert(pruned, done)
    assert "holds GGUF files" in refused("convert", str(done))
    strange = shutil.copytree(pruned, tmp_path / "strange")
    tokenizer = json.loads((strange / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (strange / "tokenizer.json").write_text(json.dumps(tokenizer))
    (strange / "lop.json").unlink()
    assert "cuts text in a way" in refused("convert", str(strange))
    monkeypatch.setattr("lop.checkpoint.edge.types.find_spec", lambda name: None)
    assert "pip install 'gguf" in refused("convert", str(pruned))
    assert "pip install 'gguf" in refused("prune", "--target", "0.3", "--format", "gguf")


def test_biases_of_an_exported_checkpoint_are_refused(allocation: Allocation, tmp_path: Path) -> None:
    added = {
        f"model.layers.{layer}.mlp.down_proj.bias": torch.zeros(72, dtype=torch.bfloat16)
        for layer in range(SPACE.layers)
    }
    save_file(added, tmp_path / "added.safetensors")
    biases = read_header(tmp_path / "added.safetensors")
    export(MODEL, tmp_path / "biased", allocation, ORDER, about={}, format="hf", recovered=biases)
    with pytest.raises(LopError, match=r"llama\.cpp's qwen2vl has no bias there"):
        convert(tmp_path / "biased", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_beyond_float16_are_refused(pruned: Path, tmp_path: Path) -> None:
    large = shutil.copytree(pruned, tmp_path / "large")
    tensors = load_file(large / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.3.self_attn.o_proj.weight"))
    tensors[name][0, 0] = 1e6
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    (large / "lop.json").unlink()
    with pytest.raises(LopError, match=r"blk\.3\.attn_output\.weight has numbers that float16 does not hold"):
        convert(large, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_giving_up_leaves_nothing(pruned: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append(done)

    with pytest.raises(CancelledError):
        convert(pruned, tmp_path / "out", progress=progress, cancelled=lambda: len(seen) > 20)
    assert seen[-1] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_amid_writing_leaves_nothing(number: signal.Signals, pruned: Path, tmp_path: Path) -> None:
    """The command stops itself by the signal at its hundredth tensor: no moment is guessed."""
    script = f"""
import os
import lop.checkpoint.edge.files as files
plain, count = files.read_piece, 0
def read(piece):
    global count
    count += 1
    if count == 100:
        os.kill(os.getpid(), {int(number)})
    yield from plain(piece)
files.read_piece = read
from lop.cli import main
raise SystemExit(main(["convert", {str(pruned)!r}, "--out", {str(tmp_path / "out")!r}]))
"""
    # Tests may run in the background of a shell, which has its jobs ignore SIGINT.
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == (130 if number == signal.SIGINT else 143), done.stderr
    assert list(tmp_path.iterdir()) == []
    assert main(["convert", str(pruned), "--out", str(tmp_path / "out")]) == 0
    assert inspect(tmp_path / "out").damage == ""


def test_a_full_disk_leaves_nothing(pruned: Path, small_disk: Path) -> None:
    with pytest.raises((LopError, OSError)):
        convert(pruned, small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_the_pieces_are_read_a_few_rows_at_a_time(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert(pruned, tmp_path / "whole", format="gguf-q4_0")
    monkeypatch.setattr(lop.checkpoint.edge.pieces, "_STEP", 500)
    parts = convert(pruned, tmp_path / "parts", format="gguf-q4_0")
    assert parts["sha256"]["model-q4_0.gguf"] == whole["sha256"]["model-q4_0.gguf"]
