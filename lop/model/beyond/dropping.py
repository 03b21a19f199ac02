"""A forward pass in which sequences lose tokens of their images on the way."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lop.model.backbone import Backbone, Group
from lop.model.beyond.flops import flops
from lop.model.encoding import Batch

# Reads a batch with a backbone in some way: the normed states [M, H] at its tails, and the operations.
Reading = Callable[[Backbone, Batch], tuple[Tensor, int]]


@dataclass(frozen=True)
class Stage:
    """Where tokens are dropped: after so many layers, as many are left as this share of all that the image has."""

    layers: int
    kept: float


@dataclass(frozen=True)
class Plan:
    """How tokens are dropped.

    Attributes:
        stages: by ascending layers, at least one, fewer than the backbone has.
        raters: the embeddings of an image's tokens [V, H] and of the text after it, up to where the answer begins
            [S, H], to which of the latter decide [S] bool.
        keep: how much the deciding tokens look at each of an image's tokens [V], these tokens' states [V, H], and how
            many are to be left, to which [k] ascending, and their states [k, H].
    """

    stages: tuple[Stage, ...]
    raters: Callable[[Tensor, Tensor], Tensor]
    keep: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass
class _Sequence:
    """One sequence on its way.

    Attributes:
        places: [T], where in the batch its tokens were.
        images: [V], which of its places are of the image now.
        raters: [R], which of the batch's tokens decide.
        whole: how many of the image's tokens there were before any was dropped.
        tail: how many of its last tokens predict answers, or stand where those of other sequences do.
    """

    places: Tensor
    images: Tensor
    raters: Tensor
    whole: int
    tail: int


def read(backbone: Backbone, batch: Batch, plan: Plan) -> tuple[Tensor, int]:
    """The states that `dropped_tails` gives, and the operations; see `lop.model.beyond.flops`."""
    found, lengths = dropped_tails(backbone, batch, plan)
    return found, flops(backbone, lengths, len(batch.places))


@torch.inference_mode()
def dropped_tails(backbone: Backbone, batch: Batch, plan: Plan) -> tuple[Tensor, list[list[int]]]:
    """The normed states [M, H] at a batch's tails, and of each layer the tokens of each sequence.

    Tokens are rated by the attention of the layer before a stage, in which they still take part; no token of the
    answer is among the raters, as none is there when a prompt is read. Sequences without an image stay whole.

    Args:
        batch: on the backbone's device.
    """
    sequences = _sequences(batch, plan)
    x, rotation, groups = backbone.entered(batch.embeddings), batch.rotation, batch.groups
    lengths: list[list[int]] = []
    done = 0
    for stage in plan.stages:
        for layer in backbone.layers[done : stage.layers]:
            before = x
            x = backbone.feed_forward(layer, backbone.attend(layer, before, rotation, groups))
            lengths.append([len(sequence.places) for sequence in sequences])
        start, states = 0, []
        for sequence in sequences:
            part = slice(start, start + len(sequence.places))
            start = part.stop
            if sequence.whole:
                weights = backbone.weights(backbone.layers[stage.layers - 1], before[part], rotation[part]).mean(0)
                states.append(_drop(sequence, weights, x[part], stage, plan))
            else:
                states.append(x[part])
        x, done = torch.cat(states), stage.layers
        rotation = batch.rotation[torch.cat([sequence.places for sequence in sequences])]
        groups = grouped((len(sequence.places), sequence.tail) for sequence in sequences)
    lengths += [[len(sequence.places) for sequence in sequences]] * (len(backbone.layers) - done)
    moved = torch.full((len(batch),), -1, device=x.device)
    places = torch.cat([sequence.places for sequence in sequences])
    moved[places] = torch.arange(len(places), device=x.device)
    return backbone.answers(x, rotation, groups, moved[batch.tails], first=done), lengths


def _sequences(batch: Batch, plan: Plan) -> list[_Sequence]:
    answers = torch.unique_consecutive(batch.samples, return_counts=True)[1].tolist()
    tails = [group.tail for group in batch.groups for _ in range(group.count)]
    ends = torch.tensor([group.length for group in batch.groups for _ in range(group.count)]).cumsum(0).tolist()
    found = []
    for start, end, answer, tail in zip([0, *ends], ends, answers, tails):
        places = torch.arange(start, end, device=batch.embeddings.device)
        images = places[: end - start - tail][batch.is_image[start : end - tail]]
        raters = images[:0]
        if len(images):
            text = torch.arange(int(images[-1]) + 1, end - answer + 1, device=places.device)
            raters = text[plan.raters(batch.embeddings[images], batch.embeddings[text])]
        found.append(_Sequence(places, images, raters, len(images), tail))
    return found


def _drop(sequence: _Sequence, weights: Tensor, x: Tensor, stage: Stage, plan: Plan) -> Tensor:
    """Takes tokens out of a sequence, and returns the states [T', H] of those that are left."""
    inside = torch.searchsorted(sequence.places, sequence.images)
    scores = weights[torch.searchsorted(sequence.places, sequence.raters)][:, inside].mean(0)
    count = min(max(round(stage.kept * sequence.whole), 1), len(inside))
    chosen, states = plan.keep(scores, x[inside], count)
    stays = torch.ones(len(x), dtype=torch.bool, device=x.device)
    stays[inside] = False
    stays[inside[chosen]] = True
    x = x.clone()
    x[inside[chosen]] = states
    sequence.places, sequence.images = sequence.places[stays], sequence.images[chosen]
    return x[stays]


def grouped(shapes: Iterable[tuple[int, int]]) -> tuple[Group, ...]:
    """Sequences of so many tokens and with tails so long, laid end to end."""
    return tuple(Group(len(list(alike)), *shape) for shape, alike in groupby(shapes))
