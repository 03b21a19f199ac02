"""The refit that ships, against least squares over all tokens at once."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from lop.checkpoint.recovery import CATCH_UP, factors_near, refit
from lop.model.adapter import QwenVL, load_model
from lop.model.elastic import ElasticFfn, ElasticModel, Repair
from lop.model.encoding import encode
from lop.model.find import assets
from lop.model.repair import RIDGE, Refits, factors, refitted
from lop.model.samples import SampleSets
from lop.search.evaluator import Evaluator
from lop.space.allocation import Allocation
from tests.groups import GROUPS, grouped_tiny


def weighed_least_squares(
    weight: np.ndarray,
    hidden: np.ndarray,
    target: np.ndarray,
    after: np.ndarray,
    ridged_by: np.ndarray | None = None,
) -> np.ndarray:
    """W + Δ with the least `Σ ‖(W + Δ)·h − t‖² / ms(o) + λ‖Δ‖²`: the ridge as rows of their own.

    Args:
        ridged_by: the activations whose mean square λ is a share of; those of the neurons kept if None.
    """
    scale = 1 / np.sqrt(np.mean(after**2, axis=1, keepdims=True))
    rows, wanted = hidden * scale, (target - hidden @ weight.T) * scale
    ridge = RIDGE * np.mean(np.sum((rows if ridged_by is None else ridged_by * scale) ** 2, axis=0))
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


@torch.inference_mode()
def test_one_factor_near_an_allocation_refits_a_layer_at_every_width(shared_tiny: QwenVL, samples: SampleSets) -> None:
    encoded = encode(shared_tiny, samples.calibration[:40], batch_tokens=600)
    model = load_model(assets() / "model", dtype="float32")
    neurons = model.ffns[0].down_proj.weight.shape[1]
    elastic = ElasticModel(model, np.tile(np.arange(neurons), (len(model.layers), 1)))
    backbone, layer = elastic.backbone, elastic.backbone.layers[1]
    near = Allocation((neurons // 3, *[neurons // 2] * (len(model.layers) - 1)))
    made = factors_near(elastic, near, encoded)
    assert elastic.widths == (neurons,) * len(model.layers)
    states = [list(backbone.hidden(b.embeddings, b.rotation, b.groups, last=2)) for b in encoded.batches]
    after = torch.cat([each[1] for each in states]).double().numpy()
    elastic.prune(near, Refits(made, cache_bytes=1 << 20))
    first = backbone.layers[0]
    before = [
        backbone.attend(layer, backbone.feed_forward(first, backbone.attend(first, b.embeddings, *at)), *at)
        for b in encoded.batches
        for at in [(b.rotation, b.groups)]
    ]
    elastic.restore()
    ffn = cast(ElasticFfn, layer.ffn)
    inputs = [backbone.ffn_input(layer, x) for x in before]
    hidden = torch.cat([ffn.hidden(x) for x in inputs]).double().numpy()
    whole = torch.cat([ffn(x) for x in inputs]).double().numpy()
    target = whole + CATCH_UP * (after - torch.cat(before).double().numpy() - whole)
    for width in (1, neurons // 4, neurons // 2, neurons - 1, neurons):
        weight = ffn.down[:, :width].double().numpy()
        expected = weighed_least_squares(weight, hidden[:, :width], target, after, hidden)
        found = refitted(ffn.down, made[1], width)
        np.testing.assert_allclose(found.double(), expected, rtol=2e-3, atol=2e-4)


class Shipped:
    """A repair whose weights an export has solved for."""

    def __init__(self, elastic: ElasticModel, allocation: Allocation, weights: list[tuple[torch.Tensor, ...]]) -> None:
        self._parts = [down for down, _ in weights] + [out for _, out in weights]

    def __call__(self, axis: int, part: ElasticFfn) -> None:
        """Sets the weights."""
        part.refit(self._parts[axis])


def test_what_is_scored_near_an_allocation_is_nearly_what_ships(tmp_path: Path, samples: SampleSets) -> None:
    model = load_model(grouped_tiny(tmp_path), dtype="float32")
    neurons, layers = model.ffns[0].down_proj.weight.shape[1], len(model.layers)
    elastic = ElasticModel(
        model, np.tile(np.arange(neurons), (layers, 1)), groups=np.tile(np.arange(GROUPS), (layers, 1))
    )
    encoded = encode(model, samples.calibration[:60], batch_tokens=600)
    asked = encode(model, samples.reward[:60], batch_tokens=600)
    widths = [neurons // 2 if layer % 2 else neurons for layer in range(layers)]
    groups = [1 if layer % 3 == 0 else GROUPS for layer in range(layers)]
    near = Allocation((*widths, *groups))
    moved = Allocation((*(widths[:3] + [width - 20 for width in widths[3:5]] + widths[5:]), *groups))

    def cost(allocation: Allocation, repair: Repair) -> float:
        evaluator = Evaluator(elastic, asked, repair=repair, divergence=True)
        return float(evaluator.compared(allocation).divergence.mean())

    by_dense = Refits(factors(elastic.backbone, encoded, attention=True), cache_bytes=1 << 24)
    by_near = Refits(factors_near(elastic, near, encoded, attention=True), cache_bytes=1 << 24)
    for allocation, apart in ((near, 0.03), (moved, 0.15)):
        ffns, heads = allocation.widths[:layers], allocation.widths[layers:]
        weights = [
            (each.down.clone(), each.out.clone())
            for each in refit(elastic.backbone, elastic.backbone.layers, encoded, ffns, heads)
        ]
        elastic.restore()
        ships = cost(allocation, Shipped(elastic, allocation, weights))
        assert cost(allocation, by_near) == pytest.approx(ships, rel=apart)
        assert abs(cost(allocation, by_near) - ships) < abs(cost(allocation, by_dense) - ships)
