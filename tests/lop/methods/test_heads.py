"""Baselines that prune attention, too: scores and widths by hand, and held against transformers' own gradients."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lop.methods.flap import over_both_parts
from lop.methods.llm_pruner import middle_layers
from lop.methods.method import Given
from lop.methods.registry import METHODS
from lop.methods.spread import joint_threshold
from lop.model.adapter import QwenVL, load_model
from lop.model.backbone import Heads
from lop.model.encoding import Encoded, encode
from lop.model.importance import flap_groups, of_groups
from lop.model.said import next_said
from lop.model.samples import SampleSets
from lop.model.taylor import coupled_heads, head_terms
from lop.model.walk import Walk
from lop.space.allocation import Attention, Space
from tests.groups import GROUPS, grouped_tiny
from tests.lop.methods.test_baselines import HAND
from tests.lop.model.test_taylor import PASSAGES, answer_backward, in_dense_order, prose

SPACE = Space(2, 4, 1, 0.75, None, Attention(2, group_parameters=5, neuron_parameters=2), vanishing=True)
# Columns of two groups, the metrics squared 1, 4, 9 and 16 in both layers: mean 7.5, unbiased deviation √43.
SAID = np.array([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
OUT = np.array([[[1.0, 1.0], [1.0, 1.0]], [[4.0, 3.0], [2.0, 1.0]]]) ** 0.5
BY_HAND = replace(HAND, surveys={"said_variance": SAID, "out_l2": OUT})


@pytest.fixture
def grouped(tmp_path: Path) -> QwenVL:
    return load_model(grouped_tiny(tmp_path), dtype="float32")


@pytest.fixture
def few(grouped: QwenVL, samples: SampleSets) -> Encoded:
    return encode(grouped, samples.calibration[:12], batch_tokens=200)


def test_flaps_metric_of_groups_worked_by_hand() -> None:
    apart = 5 / 43**0.5
    np.testing.assert_allclose(flap_groups(BY_HAND), [[-apart, apart], [apart, -apart]])
    np.testing.assert_array_equal(of_groups(BY_HAND, "flap-heads"), flap_groups(BY_HAND))
    alike = replace(HAND, surveys={"said_variance": np.ones((1, 2, 2)), "out_l2": np.ones((1, 2, 2))})
    np.testing.assert_array_equal(flap_groups(alike), [[0, 0]])


def test_one_threshold_over_both_parts_worked_by_hand() -> None:
    neurons = np.array([[2.0, 1.0, 0.0, -3.0], [1.5, 0.5, -1.0, -2.0]])
    groups = np.array([[3.0, -1.0], [0.2, -4.0]])
    # 5 for the group of 3.0, four times 2 for the neurons down to 0.5, and 5 for the group of 0.2: 18 of 36.
    assert joint_threshold(neurons, groups, SPACE, SPACE.budget(0.5)).widths == (2, 2, 1, 1)
    # One less, and the second group is beyond it: what it leaves goes to the neurons.
    assert joint_threshold(neurons, groups, SPACE, 17).widths == (3, 3, 1, 0)
    # Two more, and the next neuron is paid for, the one of 0.0.
    assert joint_threshold(neurons, groups, SPACE, 20).widths == (3, 2, 1, 1)
    assert joint_threshold(neurons, groups, SPACE, 36).widths == (4, 4, 2, 2)


def test_flap_of_ffns_alone_is_flap() -> None:
    space = Space(2, 3, 1, 0.7)
    given = Given(space, "activation", HAND)
    for budget in (2, 4, 5):
        assert METHODS["flap-heads"](given, budget).allocation == METHODS["flap"](given, budget).allocation
    both = Space(2, 3, 1, 0.7, None, Attention(2, group_parameters=4, neuron_parameters=2), vanishing=True)
    for budget in range(both.least, both.whole):
        assert both.cost(over_both_parts(BY_HAND, both, budget).widths) <= budget


def test_outer_layers_keep_their_attention_too() -> None:
    space = Space(16, 64, 1, 0.9, None, Attention(8, group_parameters=64, neuron_parameters=8))
    found = middle_layers(HAND, space, space.budget(0.375))
    # The first two and the last of 16 stay whole, and of the others 0.375·16/13 goes: 34.5 neurons and 4.3 groups
    # stay. There are none but whole groups; what those hold less, neurons hold more.
    neurons, groups = space.by_part(found.widths)
    assert (neurons[:2], neurons[-1:], groups[:2], groups[-1:]) == ((64, 64), (64,), (8, 8), (8,))
    assert set(groups[2:-1]) == {4, 5}
    assert set(neurons[2:-1]) == {36, 37}


def test_the_terms_of_groups_worked_by_hand() -> None:
    # Two groups of one query head each, heads of one number, two inputs; weights are 1, so that gradients are products.
    rows = [[3.0, -2.0], [1.0, 1.0], [-1.0, -1.0], [0.0, 0.0], [2.0, 2.0], [1.0, -1.0]]  # Queries, keys, values.
    heads = Heads(torch.ones(6, 2), torch.zeros(6), torch.ones(2, 2), 1)
    element, vector = coupled_heads(heads, [torch.tensor(rows), torch.tensor([[4.0, 1.0], [-4.0, 2.0]])])
    assert element.tolist() == [5 + 2 + 4 + 8, 2 + 0 + 2 + 3]
    assert vector.tolist() == [1 + 2 + 4 + 0, 2 + 0 + 0 + 3]


def test_the_terms_of_groups_are_those_of_transformers_own_gradients(grouped: QwenVL) -> None:
    attentions = [layer.self_attn for layer in grouped.layers]
    linears = [[getattr(each, f"{name}_proj") for name in "qkvo"] for each in attentions]
    for linear in (linear for layer in linears for linear in layer):
        linear.weight.requires_grad_()
    answer_backward(grouped)
    element, vector = torch.zeros(2, len(linears), GROUPS, dtype=torch.float64)
    for index, layer in enumerate(linears):
        for number, linear in enumerate(layer):
            salience = (linear.weight * linear.weight.grad).detach().double()
            lines = salience.T if number == 3 else salience
            element[index] += lines.abs().sum(1).view(GROUPS, -1).sum(1)
            vector[index] += lines.sum(1).abs().view(GROUPS, -1).sum(1)
            linear.weight.requires_grad_(False)
    encoded = encode(grouped, [prose(*passage) for passage in PASSAGES], batch_tokens=4)
    backbone = in_dense_order(grouped).backbone
    found = head_terms(backbone, encoded, range(12))
    for mine, theirs in ((found.element, element), (found.vector, vector)):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-3, atol=1e-4 * float(theirs.max()))
    part = head_terms(backbone, encoded, range(5, 8))
    np.testing.assert_allclose(part.element, found.element[5:8], rtol=1e-6)


@torch.inference_mode()
def test_what_heads_say_varies_as_measured(grouped: QwenVL, few: Encoded) -> None:
    backbone = in_dense_order(grouped).backbone
    walk = Walk(backbone, few)
    each = [next_said(walk) for _ in backbone.layers]
    found = {name: np.stack([one[name] for one in each]) for name in each[0]}
    seen: list[list[torch.Tensor]] = [[] for _ in backbone.layers]
    for batch in few.batches:
        told: list[torch.Tensor] = []
        for _ in backbone.hidden(batch.embeddings.clone(), batch.rotation, batch.groups, see=told.append):
            pass
        for layer, part in zip(seen, told, strict=True):
            layer.append(part.clone())
    expected = torch.stack([torch.cat(parts).double().var(0, correction=0).view(GROUPS, -1) for parts in seen])
    np.testing.assert_allclose(found["said_variance"], expected.numpy(), rtol=1e-4)
    norms = backbone.layers[3].heads.out.double().norm(dim=0).view(GROUPS, -1)
    np.testing.assert_allclose(found["out_l2"][3], norms.numpy(), rtol=1e-6)
