"""The refit that ships, against least squares over all tokens at once."""

from typing import cast

import numpy as np
import pytest
import torch

from lop.checkpoint.recovery import CATCH_UP, refit
from lop.model.adapter import QwenVL, load_model
from lop.model.elastic import ElasticFfn, ElasticModel
from lop.model.encoding import encode
from lop.model.find import assets
from lop.model.repair import RIDGE
from lop.model.samples import SampleSets


def weighed_least_squares(weight: np.ndarray, hidden: np.ndarray, target: np.ndarray, after: np.ndarray) -> np.ndarray:
    """W + Δ with the least `Σ ‖(W + Δ)·h − t‖² / ms(o) + λ‖Δ‖²`: the ridge as rows of their own."""
    scale = 1 / np.sqrt(np.mean(after**2, axis=1, keepdims=True))
    rows, wanted = hidden * scale, (target - hidden @ weight.T) * scale
    ridge = RIDGE * np.mean(np.sum(rows**2, axis=0))
    rows = np.concatenate([rows, np.sqrt(ridge) * np.eye(rows.shape[1])])
    wanted = np.concatenate([wanted, np.zeros((weight.shape[1], len(weight)))])
    return weight + np.linalg.lstsq(rows, wanted, rcond=None)[0].T


@torch.inference_mode()
@pytest.mark.parametrize("whole_before", [0, 2])
def test_each_layer_is_the_least_squares_solution_over_what_the_layers_before_it_give(
    whole_before: int, shared_tiny: QwenVL, samples: SampleSets
) -> None:
    encoded = encode(shared_tiny, samples.calibration[:40], batch_tokens=600)
    model = load_model(assets() / "model", dtype="float32")
    neurons = model.ffns[0].down_proj.weight.shape[1]
    elastic = ElasticModel(model, np.tile(np.arange(neurons), (len(model.layers), 1)))
    widths = [*[neurons] * whole_before, neurons // 3, neurons // 2]
    widths += [neurons] * (len(model.layers) - len(widths))
    backbone, last = elastic.backbone, whole_before + 2
    dense = [
        [states.clone() for states in backbone.hidden(b.embeddings, b.rotation, b.groups, last=last)]
        for b in encoded.batches
    ]
    found = [weights.down.clone() for weights in refit(backbone, backbone.layers, encoded, widths)]
    elastic.restore()
    pruned = [batch.embeddings for batch in encoded.batches]
    for index, (layer, width) in enumerate(zip(backbone.layers[:last], widths)):
        ffn = cast(ElasticFfn, layer.ffn)
        before = [backbone.attend(layer, x, b.rotation, b.groups) for x, b in zip(pruned, encoded.batches)]
        inputs = [backbone.ffn_input(layer, x) for x in before]
        whole = torch.cat([ffn(x) for x in inputs]).double().numpy()
        if width == neurons:
            assert torch.equal(found[index], ffn.down)
            pruned = [backbone.feed_forward(layer, x) for x in before]
            continue
        ffn.width = width
        hidden = torch.cat([ffn.hidden(x) for x in inputs]).double().numpy()
        residual = torch.cat(before).double().numpy()
        after = torch.cat([states[index] for states in dense]).double().numpy()
        weight = ffn.down[:, :width].double().numpy()
        target = whole + CATCH_UP * (after - residual - whole)
        expected = weighed_least_squares(weight, hidden, target, after)
        np.testing.assert_allclose(found[index].double(), expected, rtol=1e-3, atol=1e-4)
        assert np.abs(expected - weight).max() > 0.01
        ffn.refitted = found[index]
        pruned = [backbone.feed_forward(layer, x) for x in before]
    assert all(torch.equal(left, layer.ffn.down) for left, layer in zip(found[last:], backbone.layers[last:]))
