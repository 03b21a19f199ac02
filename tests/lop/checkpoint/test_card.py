"""The card of an exported checkpoint: what it says is so, and the code in it runs."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText

from lop.checkpoint.card import CARD, read_licence
from lop.checkpoint.export import export, verify
from lop.checkpoint.formats import FORMATS, Format
from lop.errors import LopError
from lop.model.find import assets
from lop.model.tensors import model_size
from lop.space.allocation import Allocation
from lop.storage.headers import read_tensors

MODEL = assets() / "model"
SIZE = model_size(read_tensors(MODEL))
ORDER = np.tile(np.arange(SIZE.neurons), (SIZE.layers, 1))
WIDTHS = tuple(SIZE.neurons // 2 + 8 * (layer % 3 - 1) for layer in range(SIZE.layers))


def exported(folder: Path, format: Format = "hf", dense: Path = MODEL, **about: Any) -> str:
    """The card of a checkpoint written to `folder`."""
    export(dense, folder, Allocation(WIDTHS), ORDER, about=about, format=format)
    return (folder / CARD).read_text()


@pytest.mark.parametrize("format", [name for name, layout in FORMATS.items() if not layout.gguf])
def test_the_card_says_what_the_checkpoint_is_and_how_to_load_it(format: Format, tmp_path: Path) -> None:
    about = {"source": "someone/dense", "recovery": "refit", "importance": "activation", "target": 0.5}
    text = exported(tmp_path / "small", format, **about)
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert card.data.base_model == "someone/dense"
    assert card.data.pipeline_tag == "image-text-to-text"
    tensors = read_tensors(tmp_path / "small").values()
    assert f"{sum(t.parameters for t in tensors):,} parameters, {sum(t.bytes for t in tensors):,} bytes" in text
    assert re.findall(r"^\| \d+ \| (\d+) \|", text, re.MULTILINE) == [str(width) for width in WIDTHS]
    assert all(
        word in text for word in ("recovery refit", "importance activation", "target 0.5000", f"format {format}")
    )
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    loaded: dict[str, Any] = {}
    exec(code.replace("PATH", str(tmp_path / "small")), loaded)
    found = [layer.mlp.down_proj.in_features for layer in loaded["model"].model.language_model.layers]
    assert found == (list(WIDTHS) if format == "hf" else [max(WIDTHS)] * len(WIDTHS))
    assert loaded["processor"].tokenizer


@pytest.mark.parametrize("format", ["gguf", "gguf-true-q8_0"])
def test_a_card_of_gguf_names_the_file_and_who_cannot_read_it(format: Format, tmp_path: Path) -> None:
    text = exported(tmp_path / "small", format)
    (file,) = (tmp_path / "small").glob("*.gguf")
    assert ModelCard(text).data.library_name == "gguf"
    assert f"llama-cli -m {file.name}" in text
    assert "mmproj" not in text
    assert ("unchanged llama.cpp" in " ".join(text.split())) == ("true" in format)


def test_it_warns_of_what_transformers_recommends_without_remote_code(tmp_path: Path) -> None:
    text = exported(tmp_path / "small")
    with pytest.raises((RuntimeError, ValueError)) as refused:
        AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
    recommended = set(re.findall(r"`(\w+)` to `?True|`(\w+)=True", str(refused.value)))
    assert recommended
    assert all(f"`{name}`" in text for names in recommended for name in names if name)


def test_it_is_hashed_like_the_other_files(tmp_path: Path) -> None:
    text = exported(tmp_path / "small")
    assert CARD in verify(tmp_path / "small")["sha256"]
    (tmp_path / "small" / CARD).write_text(text.replace("mit", "wtf"))
    with pytest.raises(LopError, match=CARD):
        verify(tmp_path / "small")


@pytest.mark.parametrize("is_named", [False, True])
def test_a_path_of_the_maker_s_machine_is_not_in_it(is_named: bool, tmp_path: Path) -> None:
    source = shutil.copytree(MODEL, tmp_path / "dense-model")
    text = exported(tmp_path / "small", dense=source, **({"source": str(source)} if is_named else {}))
    assert str(tmp_path) not in text
    assert "# dense-model," in text
    assert ModelCard(text).data.base_model is None


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\nlicense: other\nlicense_name: qwen-research\nlicense_link: https://there\nx: 1\n---\n# Title",
         {"license": "other", "license_name": "qwen-research", "license_link": "https://there"}),
        ("---\nlicense: [mit\n---\n", {}),
        ("# A title\n\n---\nlicense: mit\n---\n", {}),
        ("---\nnothing\n---\n", {}),
        (None, {}),
    ],
)  # fmt: skip
def test_the_licence_is_the_source_s_own(card: str | None, said: dict[str, str], tmp_path: Path) -> None:
    source = shutil.copytree(MODEL, tmp_path / "dense")
    (source / CARD).unlink()
    if card is not None:
        (source / CARD).write_text(card)
    assert read_licence(source) == said
    text = exported(tmp_path / "small", dense=source)
    data = ModelCard(text).data.to_dict()
    assert {name: data[name] for name in data if name.startswith("license")} == said
    assert (", ".join(said.values()) or "does not name any") in text.rpartition("## Licence")[2]
