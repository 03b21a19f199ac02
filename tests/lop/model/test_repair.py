"""Refit at every width from one factor, against the normal equations solved for that width alone."""

import numpy as np
import pytest
import torch

from lop.model.adapter import QwenVL, load_model
from lop.model.elastic import ElasticFfn, ElasticModel
from lop.model.encoding import Encoded, encode
from lop.model.find import assets
from lop.model.repair import RIDGE, Refits, factor, factors, refitted
from lop.model.samples import SampleSets
from lop.search.scoring import Scoring
from lop.space.allocation import Allocation

LAYER = 5


@pytest.fixture(scope="module")
def encoded(shared_tiny: QwenVL, samples: SampleSets) -> Encoded:
    return encode(shared_tiny, samples.calibration[:40], batch_tokens=600)


@pytest.fixture(scope="module")
def elastic() -> ElasticModel:
    model = load_model(assets() / "model", dtype="float32")
    neurons = model.ffns[0].down_proj.weight.shape[1]
    random = np.random.default_rng(0)
    return ElasticModel(model, random.permuted(np.tile(np.arange(neurons), (len(model.layers), 1)), axis=1))


@pytest.fixture(scope="module")
def made(elastic: ElasticModel, encoded: Encoded) -> list[torch.Tensor]:
    return factors(elastic.backbone, encoded)


@torch.inference_mode()
def naive_gram(elastic: ElasticModel, encoded: Encoded) -> torch.Tensor:
    """`Σ h·hᵀ` of one layer from its inputs, all tokens at once, in float64."""
    backbone, layer = elastic.backbone, elastic.backbone.layers[LAYER]
    hidden = []
    for batch in encoded.batches:
        *_, before = backbone.hidden(batch.embeddings, batch.rotation, batch.groups, last=LAYER)
        x = backbone.attend(layer, before, batch.rotation, batch.groups)
        hidden.append(ffn_of(elastic).hidden(backbone.ffn_input(layer, x)).double())
    states = torch.cat(hidden)
    return states.T @ states


def ffn_of(elastic: ElasticModel) -> ElasticFfn:
    ffn = elastic.backbone.layers[LAYER].ffn
    assert isinstance(ffn, ElasticFfn)
    return ffn


def test_every_width_is_the_direct_solution(elastic: ElasticModel, encoded: Encoded, made: list[torch.Tensor]) -> None:
    gram = naive_gram(elastic, encoded)
    weight = ffn_of(elastic).down.double()
    ridge = RIDGE * gram.diagonal().mean()
    for width in range(1, ffn_of(elastic).neurons + 1):
        kept = gram[:width, :width] + ridge * torch.eye(width, dtype=torch.float64)
        change = torch.linalg.solve(kept, (weight[:, width:] @ gram[width:, :width]).T).T
        found = refitted(ffn_of(elastic).down, made[LAYER], width)
        torch.testing.assert_close(found.double(), weight[:, :width] + change, rtol=1e-3, atol=1e-4)


def test_silent_neurons_can_be_refitted() -> None:
    gram = torch.zeros(6, 6, dtype=torch.float64)
    gram[:3, :3] = torch.eye(3)
    down = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    found = refitted(down, factor(gram), 4)
    assert found.isfinite().all()
    torch.testing.assert_close(found, down[:, :4])  # Nothing that is pruned was ever heard.


def test_a_candidate_is_repaired_and_the_model_dense_again(
    elastic: ElasticModel, encoded: Encoded, made: list[torch.Tensor]
) -> None:
    half = Allocation((ffn_of(elastic).neurons // 2,) * len(elastic.backbone.layers))
    scoring = Scoring(elastic.backbone, encoded)
    before = scoring.scores().log_probability
    refits = Refits(made, cache_bytes=1 << 30)
    found = []
    for repair in (None, refits, refits):
        with elastic.pruned(half, repair):
            found.append(scoring.scores().log_probability)
    assert found[1].mean() > found[0].mean() + 0.1
    assert (found[1] == found[2]).all()
    assert (scoring.scores().log_probability == before).all()


def test_weights_are_kept_within_the_memory_given(elastic: ElasticModel, made: list[torch.Tensor]) -> None:
    ffn = ffn_of(elastic)
    row = ffn.down[:, :1].nbytes
    refits = Refits(made, cache_bytes=row * 25)
    first = []
    for width in (10, 12, 14, 10):
        ffn.width = width
        refits(LAYER, ffn)
        first.append(ffn.refitted)
        held = sum(weights.nbytes for weights in refits._known.values())
        assert held <= row * 25
        assert ffn.refitted is not None
        assert ffn.refitted.shape == (ffn.down.shape[0], width)
    torch.testing.assert_close(first[0], first[3])  # Solved for again, once it had made room.
    ffn.width = ffn.neurons
    ffn.refitted = None
    refits(LAYER, ffn)
    assert ffn.refitted is None  # A dense layer has nothing to make up for.
