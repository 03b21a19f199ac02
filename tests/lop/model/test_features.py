"""Features against what they stand for, computed the long way."""

import numpy as np
import pytest
import torch

from lop.model.adapter import load_model
from lop.model.elastic import ElasticModel
from lop.model.encoding import Encoded, encode
from lop.model.features import measure_features
from lop.model.find import assets
from lop.model.repair import factors, refitted
from lop.model.samples import SampleSets
from lop.space.features import PRUNED, SCALARS, Features

LAYER, HALF = 5, PRUNED.index(0.5)


@pytest.fixture(scope="module")
def elastic() -> ElasticModel:
    model = load_model(assets() / "model", dtype="float32")
    neurons = model.ffns[0].down_proj.weight.shape[1]
    return ElasticModel(model, np.tile(np.arange(neurons), (len(model.layers), 1)))


@pytest.fixture(scope="module")
def few(elastic: ElasticModel, samples: SampleSets) -> Encoded:
    return encode(load_model(assets() / "model", dtype="float32"), samples.calibration[:60], batch_tokens=600)


@pytest.fixture(scope="module")
def features(elastic: ElasticModel, few: Encoded) -> Features:
    return measure_features(elastic.backbone, few)


def test_curves_rise_and_every_number_is_finite(features: Features) -> None:
    assert np.isfinite(features.curves).all()
    assert np.isfinite(features.scalars).all()
    assert (np.diff(features.curves, axis=2) >= 0).all()
    assert (features.curve("refit") <= 1e-9).all()
    assert (features.curve("energy") <= 1e-9).all()


def test_the_refit_error_is_that_of_the_refitted_weights(
    elastic: ElasticModel, few: Encoded, features: Features
) -> None:
    backbone, layer = elastic.backbone, elastic.backbone.layers[LAYER]
    hidden = []
    for batch in few.batches:
        *_, before = backbone.hidden(batch.embeddings.clone(), batch.rotation, batch.groups, last=LAYER)
        x = backbone.attend(layer, before, batch.rotation, batch.groups)
        hidden.append(layer.ffn.hidden(backbone.ffn_input(layer, x)))
    h = torch.cat(hidden)
    down, width = layer.ffn.down, round(layer.ffn.neurons / 2)
    kept = refitted(down, list(factors(backbone, few))[LAYER], width)
    error = (h[:, :width] @ kept.T - h @ down.T).square().sum() / (h @ down.T).square().sum()
    # The ridge, which the curve counts as energy, is a hundredth of the neurons'.
    assert features.curve("refit")[LAYER, HALF] == pytest.approx(float(error.log()), abs=0.5)


def test_scalars_tell_the_first_layer_from_the_others(features: Features) -> None:
    found = dict(zip(SCALARS, features.scalars.T))
    assert found["depth"].tolist() == pytest.approx([(layer + 0.5) / 12 for layer in range(12)])
    assert found["layers"] == pytest.approx(np.log(12))
    assert found["change"].argmax() == 0  # It turns embeddings into something else.
    assert (np.diff(found["decay"][1:6]) < 0).all()


def test_the_same_seed_gives_the_same_features_and_the_batches_change_little(
    elastic: ElasticModel, samples: SampleSets, features: Features, few: Encoded
) -> None:
    again = measure_features(elastic.backbone, few)
    assert np.array_equal(again.curves, features.curves)
    assert np.array_equal(again.scalars, features.scalars)
