"""Less computed for images' tokens: against loops that compute no more than is left, and how much that is."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lop.methods.yopo import active, pruned_once, sights
from lop.model.adapter import QwenVL
from lop.model.backbone import Backbone, Layer, rotate
from lop.model.beyond.flops import ffn_weights, flops, heads_weights, layer_weights
from lop.model.beyond.visual import Sight, Sights, seen_tails, visual_ratios
from lop.model.elastic import ElasticFfn
from lop.model.encoding import Batch, Encoded, encode
from lop.model.samples import Sample, SampleSets
from lop.space.allocation import Allocation
from tests.lop.model.test_taylor import in_dense_order, prose

HEADS = (torch.tensor([True, False, True]), torch.tensor([True] * 3), torch.tensor([False] * 3))


class _Naive:
    """One sequence, token by token and head by head; counts two operations for each product that it computes."""

    def __init__(self, backbone: Backbone, batch: Batch, sights: Sights) -> None:
        self.backbone, self.batch, self.sights, self.flops = backbone, batch, sights, 0
        self.image, self.count = batch.is_image.tolist(), len(batch)

    def tails(self) -> Tensor:
        x, tokens = list(self.batch.embeddings), list(range(self.count))
        for index, layer in enumerate(self.backbone.layers):
            if index == len(self.sights.layers):
                x = [state for state, image in zip(x, self.image) if not image]
                tokens = [token for token in tokens if not self.image[token]]
            whole = Sight(torch.ones(layer.heads.queries, dtype=torch.bool), cast(ElasticFfn, layer.ffn).width)
            x = self.layer(layer, x, tokens, self.sights.layers[index] if index < len(self.sights.layers) else whole)
        self.flops += 2 * len(self.batch.places) * self.backbone.head.numel()
        return self.backbone.normed(torch.stack(x)[[tokens.index(int(tail)) for tail in self.batch.tails]])

    def layer(self, layer: Layer, x: list[Tensor], tokens: list[int], sight: Sight) -> list[Tensor]:
        heads, size = layer.heads, layer.heads.size
        normed = self.backbone.attention_input(layer, torch.stack(x))

        def projected(place: int, row: int, *, turned: bool) -> Tensor:
            self.flops += 2 * size * len(normed[place])
            rows = slice(row * size, (row + 1) * size)
            found = F.linear(normed[place], heads.qkv[rows], heads.qkv_bias[rows])[None, None].clone()
            if turned:
                rotate(found, self.batch.rotation[tokens[place], None, None][0][None])
            return found[0, 0]

        keys, values = {}, {}
        for place, token in enumerate(tokens):
            for group in range(heads.width):
                mine = sight.active[group * heads.shared : (group + 1) * heads.shared]
                if not self.image[token] or mine.any():
                    keys[place, group] = projected(place, heads.queries + group, turned=True)
                    values[place, group] = projected(place, heads.queries + heads.width + group, turned=False)
        after = []
        for place, token in enumerate(tokens):
            state = x[place]
            for head in range(heads.queries):
                if self.image[token] and not sight.active[head]:
                    continue
                query, group = projected(place, head, turned=True), head // heads.shared
                looked = [at for at in range(len(tokens)) if self._looks(token, tokens[at], bool(sight.active[head]))]
                self.flops += 4 * size * len(looked)  # Whether or not it comes later, as everywhere.
                earlier = [at for at in looked if at <= place]
                weights = torch.stack([query @ keys[at, group] / size**0.5 for at in earlier]).softmax(0)
                said = sum(weight * values[at, group] for weight, at in zip(weights, earlier))
                out = heads.out[:, head * size : (head + 1) * size]
                self.flops += 2 * out.numel()
                state = state + out @ cast(Tensor, said)
            after.append(state + self.ffn(layer, state, sight.neurons if self.image[token] else None))
        return after

    def ffn(self, layer: Layer, state: Tensor, neurons: int | None) -> Tensor:
        ffn = cast(ElasticFfn, layer.ffn)
        count = ffn.width if neurons is None else neurons
        x = self.backbone.ffn_input(layer, state[None])[0]
        self.flops += 2 * 3 * count * len(x)
        return ffn.down[:, :count] @ (F.silu(ffn.gate[:count] @ x) * (ffn.up[:count] @ x))

    def _looks(self, token: int, other: int, is_active: bool) -> bool:
        if not self.image[other]:
            return True
        apart = (self.batch.grid[token] - self.batch.grid[other]).abs().max()
        return is_active and (not self.image[token] or bool(apart <= self.sights.radius))


def _one(tiny: QwenVL, sample: Sample) -> Batch:
    (batch,) = encode(tiny, [sample], batch_tokens=100).batches
    return batch


@torch.inference_mode()
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("layers", [3, 12])
def test_what_is_left_is_what_loops_compute(pruned: bool, layers: int, tiny: QwenVL, samples: SampleSets) -> None:
    elastic = in_dense_order(tiny)
    if pruned:
        elastic.prune(Allocation((80, 40, 160, *(64,) * 9)))
    batch = _one(tiny, samples.reward[0])
    few = Sights(tuple(Sight(HEADS[index % 3], 7 + index) for index in range(layers)), 0)
    naive = _Naive(elastic.backbone, batch, few)
    found, spent = seen_tails(elastic.backbone, batch, few)
    torch.testing.assert_close(found, naive.tails(), rtol=0, atol=2e-4)
    assert spent == naive.flops


@torch.inference_mode()
def test_neighbours_are_those_in_a_window(tiny: QwenVL, samples: SampleSets) -> None:
    backbone = in_dense_order(tiny).backbone
    batch = _one(tiny, samples.reward[0])
    images = batch.is_image.nonzero()[:, 0]
    # Four tokens in a row: of sixteen pairs ten are next to each other, or the same.
    grid = batch.grid.clone()
    grid[images] = torch.tensor([[5, 5], [5, 6], [5, 7], [5, 8]], dtype=torch.int32)
    batch = replace(batch, grid=grid)
    whole = [Sight(torch.ones(3, dtype=torch.bool), 160)] * 12
    dense, everything = seen_tails(backbone, batch, Sights(tuple(whole), 3))
    torch.testing.assert_close(dense, backbone.answers(batch.embeddings, batch.rotation, batch.groups, batch.tails))
    assert everything == flops(backbone, [[len(batch)]] * 12, len(batch.places))
    found, spent = seen_tails(backbone, batch, Sights(tuple(whole), 1))
    assert everything - spent == 12 * 3 * 4 * 24 * (16 - 10)
    naive = _Naive(backbone, batch, Sights(tuple(whole), 1))
    torch.testing.assert_close(found, naive.tails(), rtol=0, atol=2e-4)


def test_sequences_are_read_together_as_alone(tiny: QwenVL, samples: SampleSets) -> None:
    backbone = in_dense_order(tiny).backbone
    few = Sights(tuple(Sight(HEADS[index % 3], 40) for index in range(5)), 0)
    asked = [*samples.reward[:9], prose("a red circle.", " is there a red shape? yes")]
    together, spent = seen_tails(backbone, encode(tiny, asked, batch_tokens=1000).batches[0], few)
    assert len(encode(tiny, asked, batch_tokens=1000).batches) == 1
    alone = [seen_tails(backbone, _one(tiny, sample), few) for sample in asked]
    assert spent == sum(each for _, each in alone)
    # Without an image nothing changes.
    text = _one(tiny, asked[-1])
    torch.testing.assert_close(alone[-1][0], backbone.answers(text.embeddings, text.rotation, text.groups, text.tails))
    rows = {tuple(row) for row in together.mul(1e3).round().int()[:, :4].tolist()}
    assert sum(tuple(tails.mul(1e3).round().int()[-1, :4].tolist()) in rows for tails, _ in alone) >= 8


@torch.inference_mode()
def test_heads_are_rated_by_how_they_look_at_images(tiny: QwenVL, samples: SampleSets) -> None:
    backbone, chosen = in_dense_order(tiny).backbone, samples.reward[:3]
    expected = []
    for batch in (_one(tiny, sample) for sample in chosen):
        (x,) = backbone.hidden(batch.embeddings, batch.rotation, batch.groups, last=1)
        weights, image = backbone.weights(backbone.layers[1], x, batch.rotation).tolist(), batch.is_image.tolist()
        looked = [[sum(row[at] for row in head) for at in range(len(batch))] for head in weights]
        on_image = [sum(each for each, is_image in zip(head, image) if is_image) for head in looked]
        expected.append([on / (sum(head) - on) for on, head in zip(on_image, looked)])
    asked = [*chosen, prose("a red circle.", " is there a red shape? yes")]
    ratios = visual_ratios(backbone, encode(tiny, asked, batch_tokens=60))
    assert [mine.shape for mine in ratios] == [(3,)] * 12
    assert ratios[1].tolist() == pytest.approx([sorted(each)[1] for each in zip(*expected)], rel=1e-4)


def test_dormant_are_those_that_look_least_at_images() -> None:
    ratios = [torch.tensor(row) for row in ([0.0, 0.0], [0.1, 0.0], [0.5, 0.2], [0.1, 0.9])]
    assert [kept.tolist() for kept in active(ratios, 0.75)] == [[1, 1], [1, 1], [1, 0], [0, 1]]
    assert [kept.tolist() for kept in active(ratios, 0.1)] == [[1, 1], [1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize("dropped", [0.0, 1 / 3, 0.5, 0.75, 1.0])
def test_it_computes_as_much_for_images_as_fastv(dropped: float, tiny: QwenVL, encoded: Encoded) -> None:
    elastic = in_dense_order(tiny)
    elastic.prune(Allocation((80, 40, 160, *(64,) * 9)))
    backbone = elastic.backbone
    mine = sights(backbone, visual_ratios(backbone, encoded), dropped)
    if dropped == 0:
        assert [(int(sight.active.sum()), sight.neurons) for sight in mine.layers] == [
            (3, width) for width in elastic.widths
        ]
    whole = [layer_weights(layer) for layer in backbone.layers]
    spent = sum(
        heads_weights(layer, sight.active) + ffn_weights(layer, sight.neurons)
        for layer, sight in zip(backbone.layers, mine.layers)
    )
    # Up to a neuron a layer.
    assert 0 <= sum(whole[:2]) + (1 - dropped) * sum(whole[2:]) - spent <= 12 * 3 * 72
    for batch in encoded.batches:
        assert torch.isfinite(pruned_once(backbone, lambda: encoded, dropped)(backbone, batch)[0]).all()
