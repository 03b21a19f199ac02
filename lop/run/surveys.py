"""Surveys: further passes over the calibration samples, made for the methods that read what they find.

Each is made once for a model and its samples, in pieces that may be made side by side, and is kept beside the
statistics; `lop.stages.surveys` makes them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lop.methods.method import Method, Need
from lop.model.removal import remove_greedily
from lop.model.said import next_said
from lop.model.samples import Sample
from lop.model.sequences import sequence_squares
from lop.model.statistics import NeuronStatistics
from lop.model.taylor import head_terms, taylor_terms
from lop.model.walk import Walk, next_gram
from lop.run.building import Workshop
from lop.run.run import Run
from lop.run.spectra import layer_spectra
from lop.space.size import ModelSize

# A piece of a survey: from which layer, or which sample, to before which.
Piece = tuple[int, int]
Arrays = Mapping[str, np.ndarray]
# Makes pieces; soonest in ascending order.
Surveyor = Callable[[Piece], Arrays]

# What gradients may take of a worker's memory: as many layers as fit are a piece, and a pass over the samples.
_GRADIENT_BYTES = 2 << 30
_SAMPLES = 128
_DOUBLE, _SINGLE = 8, 4


@dataclass(frozen=True)
class Survey:
    """A kind of survey.

    Attributes:
        pieces: for a model and a number of calibration samples.
        open: what makes them with a model in the dense order and all samples.
        merge: what the arrays of all pieces come to together.
        memory: bytes that it needs beside the model, the samples' states and one batch's activations.
    """

    pieces: Callable[[ModelSize, int], list[Piece]]
    open: Callable[[Workshop, Sequence[Sample]], Surveyor]
    merge: Callable[[Sequence[np.ndarray]], np.ndarray]
    memory: Callable[[ModelSize], int]


def _gradient_bytes(size: ModelSize) -> int:
    """Of one layer."""
    return size.neurons * size.neuron_parameters * _SINGLE


def _gradient_layers(size: ModelSize) -> int:
    return min(max(_GRADIENT_BYTES // _gradient_bytes(size), 1), size.layers)


def _split(count: int, step: int) -> list[Piece]:
    return [(first, min(first + step, count)) for first in range(0, count, step)]


class _Gradients:
    def __init__(self, workshop: Workshop, samples: Sequence[Sample]) -> None:
        self._backbone = workshop.elastic.backbone
        self._encoded = workshop.encode(samples)

    def __call__(self, layers: Piece) -> Arrays:
        return vars(taylor_terms(self._backbone, self._encoded, range(*layers)))


class _HeadGradients(_Gradients):
    def __call__(self, layers: Piece) -> Arrays:
        found = head_terms(self._backbone, self._encoded, range(*layers))
        return {f"head_{name}": terms for name, terms in vars(found).items()}


class _Sequences:
    def __init__(self, workshop: Workshop, samples: Sequence[Sample]) -> None:
        self._workshop, self._samples = workshop, samples

    def __call__(self, samples: Piece) -> Arrays:
        encoded = self._workshop.encode(self._samples[slice(*samples)])
        return {"squares": sequence_squares(self._workshop.elastic.backbone, encoded)}


class _Walking:
    """Makes pieces of one layer each, which follow one another."""

    def __init__(self, workshop: Workshop, samples: Sequence[Sample]) -> None:
        self._backbone, self._encoded = workshop.elastic.backbone, workshop.encode(samples)
        self._walk = Walk(self._backbone, self._encoded)

    def __call__(self, layers: Piece) -> Arrays:
        if self._walk.layer > layers[0]:  # There is no way back.
            self._walk = Walk(self._backbone, self._encoded)
        while self._walk.layer < layers[0]:
            self._walk.step()
        return {name: found[None] for name, found in self._next(self._walk).items()}

    def _next(self, walk: Walk) -> Arrays:
        raise NotImplementedError


class _Heads(_Walking):
    def _next(self, walk: Walk) -> Arrays:
        return next_said(walk)


class _Removal(_Walking):
    def _next(self, walk: Walk) -> Arrays:
        found = remove_greedily(walk.ffn.down, next_gram(walk))
        return {"order": found.order, "errors": found.errors}


# By the value of the need that it meets.
SURVEYS = {
    Need.GRADIENTS.value: Survey(
        pieces=lambda size, _: _split(size.layers, _gradient_layers(size)),
        open=_Gradients,
        merge=np.concatenate,
        memory=lambda size: _gradient_layers(size) * _gradient_bytes(size),
    ),
    # As many layers at a time as of FFNs, whose gradients are larger.
    Need.HEAD_GRADIENTS.value: Survey(
        pieces=lambda size, _: _split(size.layers, _gradient_layers(size)),
        open=_HeadGradients,
        merge=np.concatenate,
        memory=lambda size: _gradient_layers(size) * _gradient_bytes(size),
    ),
    Need.HEADS.value: Survey(
        pieces=lambda size, _: _split(size.layers, 1), open=_Heads, merge=np.concatenate, memory=lambda size: 0
    ),
    Need.SEQUENCES.value: Survey(
        pieces=lambda _, samples: _split(samples, _SAMPLES),
        open=_Sequences,
        merge=lambda parts: np.sum(parts, axis=0),
        memory=lambda size: 0,
    ),
    Need.REMOVAL.value: Survey(
        pieces=lambda size, _: _split(size.layers, 1),
        open=_Removal,
        merge=np.concatenate,
        memory=lambda size: 3 * size.neurons**2 * _DOUBLE,
    ),
}


def surveys_of(needs: Iterable[Need]) -> list[str]:
    """The surveys among needs, in the order of `SURVEYS`."""
    asked = {need.value for need in needs}
    return [kind for kind in SURVEYS if kind in asked]


def statistics_for(run: Run, method: Method, *, progress: bool = True) -> NeuronStatistics:
    """What a method reads: the run's statistics, with the spectra and the surveys that it needs.

    Raises:
        LopError: the statistics or a survey are missing or of another model, or a file is damaged.
    """
    statistics = run.surveyed(surveys_of(method.needs))
    if Need.SPECTRA not in method.needs:
        return statistics
    return replace(statistics, exponents=layer_spectra(run, progress=progress).exponents)


def extra_seconds(run: Run, needs: Iterable[Need]) -> float:
    """What measuring the spectra and surveys among needs took, once for the model."""
    asked = frozenset(needs)
    spectra = layer_spectra(run).seconds if Need.SPECTRA in asked else 0.0
    return spectra + sum(run.survey_seconds(kind) for kind in surveys_of(asked))
