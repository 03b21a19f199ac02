"""The training of `tiny`-like models: it goes on where it stopped, and what it writes is as large as `tiny` pruned."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from lop.checkpoint.footprint import Footprint
from lop.model.adapter import load_model
from lop.model.find import assets
from lop.model.tensors import model_size
from lop.storage.headers import read_tensors

if TYPE_CHECKING:
    from training.tiny.corpus import Corpus

FLAGS = Path("/usr/share/iso-flags-png-320x240")
PACKAGES = ("countryinfo", "easy_vqa", "pycountry")

pytestmark = pytest.mark.skipif(
    not FLAGS.exists() or not all(importlib.util.find_spec(name) for name in PACKAGES),
    reason="the sources of the training are not installed",
)


def _corpus() -> "Corpus":
    """What is to be seen, with image tokens drawn by chance."""
    from training.tiny.corpus import Corpus
    from training.tiny.facts import countries
    from training.tiny.images import Picture

    shown = [("easy-vqa", (("colour", "red"), ("shape", "circle"))), ("fashion-mnist", (("product", "boot"),))]
    shown += [("flags", (("country", country.name),)) for country in countries()[:20]]
    pictures = [Picture(b"", str(index), source, labels) for index, (source, labels) in enumerate(shown)]
    tokens = torch.randn(2 * len(pictures), 4, 72, generator=torch.manual_seed(0)).bfloat16()
    return Corpus(tokens, torch.arange(0, 2 * len(pictures) + 1, 2).numpy(), pictures)


def test_a_small_model_goes_on_and_is_as_large_as_tiny_pruned(tmp_path: Path) -> None:
    from training.tiny.architecture import TINY, make_processor, save
    from training.tiny.corpus import make_questions
    from training.tiny.train import new_model, train_language

    corpus, checkpoint = _corpus(), tmp_path / "language.pt"
    _, tokenizer = new_model(0)
    questions = make_questions(tokenizer, corpus, 400, seed=0)

    def trained(steps: int) -> dict[str, torch.Tensor]:
        model, _ = new_model(0, replace(TINY, neurons=112))
        train_language(0, model, corpus, questions, checkpoint, steps=steps, seed=0, processes=1, images=4)
        assert torch.load(checkpoint, weights_only=False)["step"] == steps
        save(model.to(torch.bfloat16), make_processor(tokenizer), tmp_path / str(steps))
        return {name: tensor.clone() for name, tensor in model.model.language_model.state_dict().items()}

    short, longer = trained(3), trained(5)
    assert any(not torch.equal(tensor, longer[name]) for name, tensor in short.items())
    # What is finished is not trained again.
    assert all(torch.equal(tensor, longer[name]) for name, tensor in trained(5).items())
    parameters = sum(tensor.parameters for tensor in read_tensors(tmp_path / "5").values())
    pruned = Footprint(model_size(read_tensors(assets("tiny") / "model"))).parameters((112,) * 12)
    assert parameters == pruned
    assert {ffn.down_proj.weight.shape[1] for ffn in load_model(tmp_path / "5").ffns} == {112}
