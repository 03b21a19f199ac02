"""LLM-Pruner's first-order terms: by hand, and as its published code makes them from transformers' own gradients."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lop.model.adapter import QwenVL
from lop.model.elastic import ElasticModel
from lop.model.encoding import encode
from lop.model.samples import PROSE, Sample, SampleSets
from lop.model.taylor import coupled, taylor_terms

PASSAGES = (("a red circle.", " is there a red shape? yes"), ("", "the flag of France"))


def prose(question: str, answer: str) -> Sample:
    return Sample(b"", question or answer, "made up", "", PROSE, question, (), answer)


def in_dense_order(model: QwenVL) -> ElasticModel:
    layers, neurons = len(model.ffns), model.ffns[0].down_proj.in_features
    return ElasticModel(model, np.tile(np.arange(neurons), (layers, 1)))


def answer_backward(model: QwenVL) -> None:
    """The gradients of the loss of each passage's answer, added up, by transformers' own pass."""
    tokenizer = model.processor.tokenizer
    for question, answer in PASSAGES:
        before = tokenizer(question, add_special_tokens=False)["input_ids"] or [tokenizer.pad_token_id]
        after = tokenizer(answer, add_special_tokens=False)["input_ids"]
        logits = model.model(input_ids=torch.tensor([[*before, *after]])).logits[0, len(before) - 1 : -1]
        F.cross_entropy(logits.float(), torch.tensor(after), reduction="sum").backward()


def test_the_terms_worked_by_hand() -> None:
    # One neuron of two inputs: products are (3, −2), (−1, −1) and (4, −4).
    weights = [torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0], [4.0]])]
    gradients = [torch.tensor([[3.0, -1.0]]), torch.tensor([[-1.0, -1.0]]), torch.tensor([[2.0], [-1.0]])]
    element, vector = coupled(weights, gradients)
    assert element.tolist() == [5 + 2 + 8]
    assert vector.tolist() == [1 + 2 + 0]


def test_the_terms_are_those_of_transformers_own_gradients(tiny: QwenVL) -> None:
    matrices = [(ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight) for ffn in tiny.ffns]
    for weight in (weight for layer in matrices for weight in layer):
        weight.requires_grad_()
    answer_backward(tiny)
    # As the published code has it: rows of gate and up, columns of down, summed over the group.
    salience = [[weight * weight.grad for weight in layer] for layer in matrices]  # type: ignore[operator]
    element = [gate.abs().sum(1) + up.abs().sum(1) + down.abs().sum(0) for gate, up, down in salience]
    vector = [gate.sum(1).abs() + up.sum(1).abs() + down.sum(0).abs() for gate, up, down in salience]
    for weight in (weight for layer in matrices for weight in layer):
        weight.requires_grad_(False)
    encoded = encode(tiny, [prose(*passage) for passage in PASSAGES], batch_tokens=4)
    assert len(encoded.batches) == 2
    found = taylor_terms(in_dense_order(tiny).backbone, encoded, range(len(matrices)))
    for mine, theirs in ((found.element, element), (found.vector, vector)):
        expected = torch.stack(theirs).detach().numpy()
        np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-4 * expected.max())


@pytest.mark.parametrize("layers", [range(2), range(5, 8), range(11, 12)])
def test_some_layers_have_the_terms_that_they_have_among_all(layers: range, tiny: QwenVL, samples: SampleSets) -> None:
    backbone = in_dense_order(tiny).backbone
    encoded = encode(tiny, samples.calibration[:6], batch_tokens=100)
    whole = taylor_terms(backbone, encoded, range(12))
    part = taylor_terms(backbone, encoded, layers)
    np.testing.assert_allclose(part.element, whole.element[layers.start : layers.stop], rtol=1e-6)
    np.testing.assert_allclose(part.vector, whole.vector[layers.start : layers.stop], rtol=1e-4, atol=1e-7)
