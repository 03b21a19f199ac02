import json
from pathlib import Path

import pytest

from lop.errors import LopError
from lop.model.find import assets
from lop.model.tensors import ffn_part, model_size
from lop.space.size import Target, parse_count
from lop.storage.headers import read_tensors, weight_files


def test_sizes_are_those_of_the_file() -> None:
    tensors = read_tensors(assets() / "model")
    size = model_size(tensors)
    file = (assets() / "model" / "model.safetensors").stat().st_size
    assert 0 < file - size.bytes < 100_000
    assert size.layers >= 12
    backbone = sum(info.parameters for name, info in tensors.items() if ".layers." in name)
    assert size.neuron_parameters * size.neurons * size.layers >= 0.7 * backbone


@pytest.mark.parametrize(
    ("text", "what", "value"),
    [
        ("5B", "parameters", 5_000_000_000),
        ("350M", "parameters", 350_000_000),
        ("8GiB", "bytes", 8 * 2**30),
        ("2.5GB", "bytes", 2_500_000_000),
        ("4096", "bytes", 4096),
        ("1e9", "parameters", 1_000_000_000),
    ],
)
def test_counts_as_people_write_them(text: str, what: str, value: int) -> None:
    assert parse_count(text, what=what) == value


@pytest.mark.parametrize("text", ["", "-5B", "5X", "GiB", "0", "nan", "1e400", "5 B B"])
def test_other_counts_are_named(text: str) -> None:
    with pytest.raises(LopError, match="is not a number of parameters"):
        parse_count(text, what="parameters")


def test_a_target_is_one_number() -> None:
    with pytest.raises(LopError, match="exactly one target"):
        Target(ratio=0.5, bytes=5)


def test_ffn_tensors_are_told_from_the_vision_tower() -> None:
    assert ffn_part("model.layers.3.mlp.down_proj.weight") == "down_proj"
    assert ffn_part("model.language_model.layers.3.mlp.gate_proj.weight") == "gate_proj"
    assert ffn_part("visual.blocks.3.mlp.up_proj.weight") is None
    assert ffn_part("model.layers.3.self_attn.q_proj.weight") is None


def test_incomplete_and_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(LopError, match=r"model\.safetensors is missing"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with pytest.raises(LopError, match=r"x\.safetensors is missing"):
        weight_files(tmp_path)
    for junk in (b"", b"\x00" * 20, b"\xff" * 50, b"\x02\x00\x00\x00\x00\x00\x00\x00[]"):
        (tmp_path / "x.safetensors").write_bytes(junk)
        with pytest.raises(LopError, match="damaged"):
            read_tensors(tmp_path)
