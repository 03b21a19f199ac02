"""A forward pass that computes less for each of images' tokens than for others, until it drops them all."""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lop.model.backbone import Backbone
from lop.model.beyond.dropping import grouped
from lop.model.beyond.flops import ends_flops, layer_flops, visual_layer_flops
from lop.model.elastic import ElasticFfn, gated
from lop.model.encoding import Batch, Encoded, on_device


@dataclass(frozen=True)
class Sight:
    """What one layer computes for images' tokens.

    Attributes:
        active: [Q] bool, the heads that speak for them and look at them, as groups and heads stand in the layer.
        neurons: how many of the FFN's they use, the first.
    """

    active: Tensor
    neurons: int


@dataclass(frozen=True)
class Sights:
    """What a backbone computes for images' tokens.

    Attributes:
        layers: of its first layers, at least one; in those after them images' tokens are there no more.
        radius: how many rows and columns away, at most, an image's tokens look at each other.
    """

    layers: tuple[Sight, ...]
    radius: int


class _First(nn.Module):
    """An FFN of which the first neurons are used, in another way than `ElasticFfn.keep`: what was refitted stays."""

    def __init__(self, ffn: ElasticFfn, count: int) -> None:
        super().__init__()
        self._ffn, self._count = ffn, count

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        ffn, count = self._ffn, self._count
        down = ffn.down if ffn.refitted is None else ffn.refitted
        hidden = gated(F.linear(x, ffn.gate[:count]), F.linear(x, ffn.up[:count]))
        return F.linear(hidden, down[:, :count], ffn.bias)


@dataclass(frozen=True)
class _Sequence:
    """One sequence.

    Attributes:
        image: [T] bool, which of its tokens less is computed for.
        near: pairs of these that look at each other.
        looks: [T, T] bool, at which tokens each one looks.
    """

    image: Tensor
    near: int
    looks: Tensor

    def mask(self, active: Tensor) -> Tensor:
        """At which tokens each one looks with each head, [Q, T, T] bool, where some heads [Q] are active."""
        # What other heads would say of the image's tokens is not asked for.
        return self.looks & (active[:, None, None] | ~self.image | self.image[:, None])


@torch.inference_mode()
def seen_tails(backbone: Backbone, batch: Batch, sights: Sights) -> tuple[Tensor, int]:
    """The normed states [M, H] at a batch's tails, and the operations; see `lop.model.beyond.flops`.

    An image's tokens look at those of each other that are near, and as ever at what stands before them; a head that is
    not active says nothing of them, and no token looks at them with it. What is not looked at is not there when weights
    of attention are made to add up to one. Sequences without an image stay as they are.

    Args:
        batch: on the backbone's device.
    """
    visual = batch.is_image.clone()
    visual[batch.tails] = False  # Where answers of sequences as long are predicted, tokens stay.
    shapes = [(group.length, group.tail) for group in batch.groups for _ in range(group.count)]
    lengths = [length for length, _ in shapes]
    sequences = [
        _sequence(grid, image, sights.radius) for grid, image in zip(batch.grid.split(lengths), visual.split(lengths))
    ]
    images = [int(sequence.image.sum()) for sequence in sequences]
    x, spent = backbone.entered(batch.embeddings), 0
    for layer, sight in zip(backbone.layers, sights.layers):
        for length, count, sequence in zip(lengths, images, sequences):
            spent += visual_layer_flops(layer, length - count, sequence.near, count, sight.active, sight.neurons)
        if layer.heads.width:
            masks = [sequence.mask(sight.active) for sequence in sequences]
            said = backbone.heads_at(layer, x, batch.rotation, batch.groups, masks)
            said.unflatten(1, (-1, layer.heads.size))[visual[:, None] & ~sight.active] = 0
            x = backbone.add_heads(layer, x, said)
        else:
            x = backbone.attend(layer, x, batch.rotation, batch.groups)
        few = replace(layer, ffn=_First(cast(ElasticFfn, layer.ffn), sight.neurons))
        found = [backbone.feed_forward(of, x[which]) for of, which in ((layer, ~visual), (few, visual))]
        x = found[0].new_empty(len(x), found[0].shape[1])
        x[~visual], x[visual] = found
    left = [length - count for length, count in zip(lengths, images)]
    spent += sum(layer_flops(layer, length) for layer in backbone.layers[len(sights.layers) :] for length in left)
    spent += ends_flops(backbone, sum(lengths), len(batch.places))
    if len(sights.layers) == len(backbone.layers):
        return backbone.normed(x[batch.tails]), spent
    groups = grouped((length, tail) for length, (_, tail) in zip(left, shapes))
    tails = ((~visual).cumsum(0) - 1)[batch.tails]
    return backbone.answers(x[~visual], batch.rotation[~visual], groups, tails, first=len(sights.layers)), spent


@torch.inference_mode()
def visual_ratios(backbone: Backbone, encoded: Encoded) -> list[Tensor]:
    """Of each layer, how much its heads [Q] look at images: of the weights of attention, those on images' tokens by
    those on all others, summed over the tokens that look; the median over the samples that have an image.
    """
    found: list[list[Tensor]] = [[] for _ in backbone.layers]
    for batch in on_device(encoded.batches, backbone.norm.device):
        lengths = [group.length for group in batch.groups for _ in range(group.count)]
        images, rotations = batch.is_image.split(lengths), batch.rotation.split(lengths)
        before = backbone.entered(batch.embeddings)
        after = backbone.hidden(batch.embeddings, batch.rotation, batch.groups)
        for ratios, layer in zip(found, backbone.layers):
            for x, image, rotation in zip(before.split(lengths), images, rotations):
                if image.any():
                    weights = backbone.weights(layer, x, rotation).sum(1)
                    ratios.append(weights[:, image].sum(1) / weights[:, ~image].sum(1))
            before = next(after)
    return [torch.stack(ratios).median(0).values for ratios in found]


def _sequence(grid: Tensor, image: Tensor, radius: int) -> _Sequence:
    close = (grid[:, None] - grid).abs().amax(2) <= radius
    pairs = image[:, None] & image
    return _Sequence(image, int((pairs & close).sum()), (close | ~pairs).tril())
