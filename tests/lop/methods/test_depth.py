"""Layers removed: which, what makes up for them, and checkpoints that any loader builds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from lop.checkpoint.depth import export_layers
from lop.checkpoint.export import verify
from lop.cli import main
from lop.errors import LopError
from lop.methods.llm_streamline import most_alike
from lop.methods.registry import RESHAPINGS
from lop.model.adapter import QwenVL
from lop.model.backbone import Backbone, Heads
from lop.model.beyond.depth import layer_parameters, layers_to_remove, linear_map, similarities, turned, with_down
from lop.model.beyond.lightweight import fitted_layer
from lop.model.encoding import Encoded, encode
from lop.model.find import assets
from lop.model.samples import SampleSets
from lop.search.scoring import Scoring
from tests.lop.model.test_model import inputs_of
from tests.lop.model.test_taylor import PASSAGES, in_dense_order, prose
from tests.lop.stages.samples_few import few_samples

# Layers that say nothing.
IDLE = (3, 4, 7)
REMOVING = [name for name in RESHAPINGS if name.startswith(("shortgpt", "llm-streamline"))]
EXACT = {"rtol": 0.0, "atol": 2e-4}


@pytest.fixture
def backbone(tiny: QwenVL) -> Backbone:
    return in_dense_order(tiny).backbone


@pytest.fixture
def idle(backbone: Backbone) -> Backbone:
    layers = list(backbone.layers)
    for index in IDLE:
        silent = with_down(layers[index], torch.zeros(72, 160))
        heads = silent.heads
        mute = Heads(heads.qkv, heads.qkv_bias, torch.zeros_like(heads.out), heads.size)
        layers[index] = replace(silent, heads=mute)
    return replace(backbone, layers=tuple(layers))


@torch.inference_mode()
def tails(backbone: Backbone, encoded: Encoded) -> torch.Tensor:
    """The last states of all batches."""
    return torch.cat(Scoring(backbone, encoded).all_tails())


def error(dense: Backbone, found: Backbone, encoded: Encoded) -> float:
    return float((tails(dense, encoded) - tails(found, encoded)).square().mean())


@torch.inference_mode()
def test_similarities_are_those_of_transformers_own_states(tiny: QwenVL) -> None:
    tokenizer = tiny.processor.tokenizer
    each = []
    for passage in PASSAGES:
        before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in passage)
        ids = torch.tensor([[*(before or [tokenizer.pad_token_id]), *after[:-1]]])
        each.append(tiny.model(input_ids=ids, output_hidden_states=True).hidden_states)
    states = [torch.cat([found[0] for found in layer]) for layer in zip(*each)]
    encoded = encode(tiny, [prose(*passage) for passage in PASSAGES], batch_tokens=4)
    found = similarities(in_dense_order(tiny).backbone, encoded, 2)
    expected = [F.cosine_similarity(x, y).mean() for x, y in zip(states, states[2:])]
    assert len(found) == 11
    # transformers' last states are normed.
    np.testing.assert_allclose(found[:-1], expected[:-1], rtol=1e-5)


def test_layers_that_say_nothing_are_those_removed(idle: Backbone, encoded: Encoded) -> None:
    per_layer = layer_parameters(idle.layers[0])
    found = RESHAPINGS["shortgpt"].reshape(idle, encoded, 3 * per_layer, False)
    assert found.places == tuple(index for index in range(12) if index not in IDLE)
    assert found.removed == 3 * per_layer
    torch.testing.assert_close(tails(found.backbone, encoded), tails(idle, encoded), **EXACT)
    assert most_alike(idle, encoded, 2) == 3
    found = RESHAPINGS["llm-streamline-none"].reshape(idle, encoded, 2 * per_layer, True)
    assert found.places == (0, 1, 2, *range(5, 12))
    torch.testing.assert_close(tails(found.backbone, encoded), tails(idle, encoded), **EXACT)
    matrix = linear_map(idle, encoded, 3, 2)
    torch.testing.assert_close(matrix, torch.eye(72), **EXACT)


def test_a_matrix_takes_the_place_of_layers_wherever_they_stand(backbone: Backbone, encoded: Encoded) -> None:
    turn = torch.linalg.qr(torch.randn(72, 72, generator=torch.manual_seed(0)))[0]
    batch = encoded.batches[0]
    with torch.inference_mode():
        (*_, x) = backbone.hidden(batch.embeddings, batch.rotation, batch.groups, last=5)
        (*_, found) = turned(backbone, turn, 5).hidden(batch.embeddings, batch.rotation, batch.groups, last=5)
        torch.testing.assert_close(found, x @ turn, **EXACT)
        torch.testing.assert_close(turned(backbone, turn, 0).entered(batch.embeddings), batch.embeddings @ turn)


def test_what_makes_up_for_layers_is_better_than_nothing(backbone: Backbone, encoded: Encoded) -> None:
    asked = 3 * layer_parameters(backbone.layers[0]) - 72**2
    errors = {}
    for name in REMOVING:
        for refit in (False, True) if RESHAPINGS[name].refits else (False,):
            found = RESHAPINGS[name].reshape(backbone, encoded, asked, refit)
            assert len(found.backbone.layers) == 9
            # As near to what was asked for as whole layers can be.
            assert asked <= found.removed < asked + layer_parameters(backbone.layers[0])
            errors[name, refit] = error(backbone, found.backbone, encoded)
    assert errors["shortgpt", True] < errors["shortgpt", False]
    assert errors["llm-streamline-none", True] < errors["llm-streamline-none", False]
    assert errors["llm-streamline-linear", False] < errors["llm-streamline-none", False]
    assert errors["llm-streamline", False] < errors["llm-streamline-none", False]


def test_a_layer_trained_to_be_itself_stays_so(backbone: Backbone, encoded: Encoded) -> None:
    kept = fitted_layer(backbone, encoded, 5, 1, steps=4)
    layers = (*backbone.layers[:5], kept, *backbone.layers[6:])
    assert error(backbone, replace(backbone, layers=layers), encoded) < 1e-6


def test_too_much_is_one_line(backbone: Backbone) -> None:
    with pytest.raises(LopError, match="all 12 layers"):
        layers_to_remove(backbone, 12 * layer_parameters(backbone.layers[0]))
    with pytest.raises(LopError, match="above 0"):
        layers_to_remove(backbone, 0)


@pytest.mark.parametrize("name", ["shortgpt", "llm-streamline"])
def test_transformers_alone_loads_what_is_left(
    name: str, tiny: QwenVL, encoded: Encoded, samples: SampleSets, tmp_path: Path
) -> None:
    dense = in_dense_order(tiny).backbone
    found = RESHAPINGS[name].reshape(dense, encoded, 2 * layer_parameters(dense.layers[0]), True)
    assert found.places is not None
    out = tmp_path / "small"
    manifest = export_layers(assets() / "model", out, dense, found.backbone, found.places, about={"source": "tiny"})
    assert verify(out) == manifest
    assert manifest["layers"] == {"kept": list(found.places), "of": 12}
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    config = loaded.config.text_config
    assert (config.num_hidden_layers, len(config.layer_types)) == (10, 10)
    sample = samples.reward[0]
    asked = encode(tiny, [sample], batch_tokens=100)
    with torch.inference_mode():
        theirs = loaded(**inputs_of(tiny, sample)).logits[0, -1]
        ours = found.backbone.logits(tails(found.backbone, asked))[-len(asked.batches[0].tokens)]
    # The checkpoint is in bfloat16.
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.15 if name == "llm-streamline" else 0.05)


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--model", "tiny", "--set", f"samples={few_samples(tmp_path)}", "--target", "0.3")
    out = str(tmp_path / "out")
    assert main(["reshape", "--method", "shortgpt", *few, "--recovery", "none", "--out", out]) == 0
    assert len(verify(Path(out))["widths"]) == 9
    card = (tmp_path / "out" / "README.md").read_text()
    assert "3 of its 12 layers removed" in card
    assert "method shortgpt" in card
    assert "filled up with zeros" not in card
    assert main(["inspect", out]) == 0
    assert "9, which were" in capsys.readouterr().out
    assert main(["reshape", "--method", "shortgpt", *few, "--out", out]) == 2
    assert main(["reshape", "--method", "llm-streamline-linear", *few, "--out", f"{out}2"]) == 2
    assert main(["reshape", "--method", "shortgpt", *few, "--recovery", "bias", "--out", f"{out}2"]) == 2
    told = capsys.readouterr().err
    assert "llm-streamline-linear has no checkpoint" in told
    assert "recovery 'bias' is not for removed layers" in told
    assert not (tmp_path / "out2").exists()
