"""Attention pruned by groups: against the dense model with the lost heads' columns of `o_proj` set to zero."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lop.errors import LopError
from lop.model.adapter import QwenVL, load_model
from lop.model.elastic import ElasticModel
from lop.model.encoding import Encoded, encode
from lop.model.importance import of_groups
from lop.model.repair import RIDGE, Refits, factors
from lop.model.samples import SampleSets
from lop.model.statistics import NeuronStatistics, calibrate, load_statistics
from lop.search.evaluator import Evaluator
from lop.search.racing import Candidate
from lop.space.allocation import Allocation
from tests.groups import GROUPS, grouped_tiny

NEURONS, LAYERS = 160, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grouped_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> QwenVL:
    """For tests that do not change it."""
    return load_model(folder, dtype="float32")


@pytest.fixture(scope="module")
def encoded(model: QwenVL, samples: SampleSets) -> Encoded:
    return encode(model, samples.reward[:40], batch_tokens=700)


@pytest.fixture(scope="module")
def statistics(model: QwenVL, encoded: Encoded) -> NeuronStatistics:
    return calibrate(model, encoded, attention=True)


@pytest.fixture(scope="module")
def orders() -> tuple[np.ndarray, np.ndarray]:
    """Of neurons and of groups, at random."""
    random = np.random.default_rng(3)
    rows = (np.tile(np.arange(count), (LAYERS, 1)) for count in (NEURONS, GROUPS))
    neurons, groups = (random.permuted(each, axis=1) for each in rows)
    return neurons, groups


@pytest.fixture(scope="module")
def shared_elastic(folder: Path, orders: tuple[np.ndarray, np.ndarray]) -> ElasticModel:
    return ElasticModel(load_model(folder, dtype="float32"), orders[0], groups=orders[1])


@pytest.fixture
def elastic(shared_elastic: ElasticModel) -> Iterator[ElasticModel]:
    yield shared_elastic
    shared_elastic.restore()


def states(of: QwenVL | ElasticModel, encoded: Encoded) -> torch.Tensor:
    """After the last layer, of all tokens."""
    backbone = of.backbone if isinstance(of, ElasticModel) else of.lean_backbone()
    with torch.inference_mode():
        return torch.cat([list(backbone.hidden(b.embeddings, b.rotation, b.groups))[-1] for b in encoded.batches])


def widths(*groups: int) -> Allocation:
    """All neurons, and the first layers' groups; all of the others'."""
    return Allocation((NEURONS,) * LAYERS + groups + (GROUPS,) * (LAYERS - len(groups)))


def test_three_copies_of_a_key_head_are_the_model_with_one(
    model: QwenVL, encoded: Encoded, shared_tiny: QwenVL, samples: SampleSets, elastic: ElasticModel
) -> None:
    plain = states(shared_tiny, encode(shared_tiny, samples.reward[:40], batch_tokens=700))
    torch.testing.assert_close(states(model, encoded), plain.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(states(elastic, encoded), states(model, encoded), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kept", [(2, 1, 3), (1, 0, 0, 2)])
def test_a_pruned_group_says_nothing(
    folder: Path, encoded: Encoded, elastic: ElasticModel, orders: tuple[np.ndarray, np.ndarray], kept: tuple[int, ...]
) -> None:
    elastic.prune(widths(*kept))
    masked = load_model(folder, dtype="float32")
    with torch.no_grad():
        for layer, count, order in zip(masked.layers, kept, orders[1]):
            out = layer.self_attn.o_proj.weight  # type: ignore[union-attr]
            for group in order[count:]:
                out.unflatten(1, (GROUPS, -1))[:, group] = 0
    torch.testing.assert_close(states(elastic, encoded), states(masked, encoded), rtol=1e-3, atol=1e-3)


def test_a_layer_without_attention_and_ffn_changes_nothing(encoded: Encoded, elastic: ElasticModel) -> None:
    allocation = widths(0)
    elastic.prune(Allocation((0, *allocation.widths[1:])))
    batch = encoded.batches[0]
    with torch.inference_mode():
        (after,) = elastic.backbone.hidden(batch.embeddings, batch.rotation, batch.groups, last=1)
    assert torch.equal(after, batch.embeddings)
    assert after.data_ptr() != batch.embeddings.data_ptr()  # The next layer works in its memory.


def test_the_last_layer_is_right_at_the_tails_alone(encoded: Encoded, elastic: ElasticModel) -> None:
    for last in (2, 0):
        elastic.prune(widths(*[GROUPS] * (LAYERS - 1), last))
        backbone, batch = elastic.backbone, encoded.batches[0]
        with torch.inference_mode():
            *_, whole = backbone.hidden(batch.embeddings, batch.rotation, batch.groups)
            tails = backbone.answers(batch.embeddings, batch.rotation, batch.groups, batch.tails)
        torch.testing.assert_close(tails, backbone.normed(whole[batch.tails]), rtol=1e-3, atol=1e-3)


def test_an_evaluation_starts_after_the_layers_that_lose_nothing(encoded: Encoded, elastic: ElasticModel) -> None:
    allocation = widths(*[GROUPS] * 6, 1)
    assert elastic.first_pruned(allocation) == 6
    assert elastic.first_pruned(widths()) == LAYERS
    plain, cached = (Evaluator(elastic, encoded, divergence=True, cache_bytes=size) for size in (0, 1 << 28))
    found = [each.evaluate(Candidate(allocation)) for each in (plain, cached)]
    assert found[0] == found[1]
    assert found[0].divergence


@torch.inference_mode()
def test_groups_are_ranked_by_what_they_add(model: QwenVL, encoded: Encoded, statistics: NeuronStatistics) -> None:
    backbone = model.lean_backbone()
    layer = backbone.layers[0]
    expected = np.zeros(GROUPS)
    for batch in encoded.batches:
        said = backbone.heads_output(layer, batch.embeddings, batch.rotation, batch.groups)
        for group, (part, out) in enumerate(zip(said.chunk(GROUPS, 1), layer.heads.out.chunk(GROUPS, 1))):
            expected[group] += float((part.double() @ out.double().T).square().sum())
    np.testing.assert_allclose(of_groups(statistics, "activation")[0], np.sqrt(expected), rtol=1e-5)
    assert len(set(of_groups(statistics, "activation")[0].round(3))) == GROUPS


def test_statistics_of_groups_are_kept_beside_those_of_neurons_and_are_not_missed(
    tmp_path: Path, statistics: NeuronStatistics, tiny_statistics: NeuronStatistics
) -> None:
    for name, each in (("both", statistics), ("ffns", tiny_statistics)):
        each.save(tmp_path / name, {"model": name})
        found, _ = load_statistics(tmp_path / name)
        assert (found.groups is None) == (each.groups is None)
    twice = statistics.merge(statistics)
    assert twice.groups is not None
    assert statistics.groups is not None
    np.testing.assert_array_equal(twice.groups, 2 * statistics.groups)
    with pytest.raises(LopError, match="lop calibrate"):
        of_groups(tiny_statistics, "activation")


@torch.inference_mode()
def test_one_factor_refits_attention_at_every_width(encoded: Encoded, elastic: ElasticModel) -> None:
    made = factors(elastic.backbone, encoded, attention=True)
    assert len(made) == 2 * LAYERS
    backbone, layer = elastic.backbone, elastic.backbone.layers[0]
    said = [backbone.heads_output(layer, b.embeddings, b.rotation, b.groups) for b in encoded.batches]
    states = torch.cat(said).double()
    gram, weight = states.T @ states, layer.heads.whole.double()
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    for width in (1, 2):
        elastic.prune(widths(width), Refits(made, cache_bytes=1 << 20))
        kept = layer.heads.columns
        lost = (weight[:, kept:] @ gram[kept:])[:, :kept]
        change = torch.linalg.solve((gram + ridge)[:kept, :kept], lost.T).T
        torch.testing.assert_close(layer.heads.out.double(), weight[:, :kept] + change, rtol=1e-3, atol=1e-4)
        assert change.abs().max() > 0.01
