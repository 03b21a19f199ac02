"""What is measured on a `Bench` beside allocations: reshaped models, less for images' tokens, and operations."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from bench import Bench, Chosen

from lop.methods.registry import CONTEXTUAL, DROPPINGS, RESHAPINGS
from lop.model.beyond.contextual import ContextualFfn
from lop.model.beyond.flops import flops
from lop.model.encoding import Encoded
from lop.search.dropping import DroppingScoring
from lop.search.racing import pack_values, unpack_values
from lop.search.scoring import Scores, Scoring
from lop.space.allocation import Allocation, dense, project, uniform
from lop.storage.fingerprint import fingerprint


@dataclass(frozen=True)
class Measured:
    """What the test items say of a model.

    Attributes:
        kl: [n], of each item.
        right: share of the questions.
        flops: to read all items, by the language backbone.
        left: parameters that the budget would have allowed on top; below zero, what it has more than the dense model.
    """

    kl: np.ndarray
    right: float
    flops: int
    seconds: float = 0.0
    left: int = 0


class Beyond:
    """Measures on a bench's items; each measurement is one of the bench's cells."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def reshaped(self, method: str, ratio: float) -> Measured:
        """A method of `RESHAPINGS`, refitted if it can be, at as many parameters as allocations of the ratio have."""
        return self._measured(
            self.bench.measured(f"reshape-{method}-{ratio}.json", lambda: self._reshape(method, ratio))
        )

    def dropped(self, dropping: str | None, share: float, base: Chosen | None) -> Measured:
        """A share of images' tokens dropped in a way of `DROPPINGS` or not at all, of an allocation or dense."""
        name = "dense" if base is None else fingerprint([base.importance, base.widths])
        cell = f"drop-{dropping}-{share:.2f}-{name}.json"
        return self._measured(self.bench.measured(cell, lambda: self._drop(dropping, share, base)))

    def contextual(self, method: str, ratio: float) -> Measured:
        """A method of `CONTEXTUAL`, with as many neurons for each token as allocations of the ratio have."""
        return self._measured(
            self.bench.measured(f"contextual-{method}-{ratio}.json", lambda: self._use(method, ratio))
        )

    def flops(self, chosen: Chosen | None = None) -> int:
        """What an allocation computes for all items, or the dense model."""
        elastic = self.bench.workshop.elastic
        with elastic.pruned(dense(self.bench.run.space) if chosen is None else Allocation(chosen.widths)):
            return sum(
                flops(elastic.backbone, [lengths] * len(elastic.backbone.layers), predicted)
                for lengths, predicted in self._shapes
            )

    def of_as_many(self, wanted: int, found: Mapping[float, Chosen]) -> Chosen | None:
        """An allocation of a method that computes at most `wanted`, as near to it as can be.

        Between the ratios that it was asked for, its ratios of layers are interpolated; None beyond the last.
        """
        space = self.bench.run.space
        whole, least = self.flops(), self.flops(found[max(found)])
        each = (whole - least) / (space.layers * space.neurons - sum(found[max(found)].widths))
        budget = space.budget(0) - int(np.ceil((whole - wanted) / each / space.granularity)) * space.granularity
        ratio = 1 - budget / space.budget(0)
        if ratio > max(found):
            return None
        known = {0.0: np.zeros(space.layers)} | {at: Allocation(it.widths).ratios(space) for at, it in found.items()}
        at = sorted(known)
        ratios = np.array([np.interp(ratio, at, layer) for layer in np.transpose([known[each] for each in at])])
        one = next(iter(found.values()))
        return Chosen(one.method, ratio, project(ratios, space, budget).widths, one.importance, 0, 0.0)

    @cached_property
    def _encoded(self) -> Encoded:
        return self.bench.workshop.encode(self.bench.items)

    @cached_property
    def _calibration(self) -> Encoded:
        return self.bench.workshop.encode(self.bench.run.samples.calibration)

    @cached_property
    def _shapes(self) -> list[tuple[list[int], int]]:
        """Of each batch, the tokens of each sequence, and how many are predicted."""
        return [
            ([group.length for group in batch.groups for _ in range(group.count)], len(batch.places))
            for batch in self._encoded.batches
        ]

    @cached_property
    def _dense(self) -> list[torch.Tensor]:
        return Scoring(self.bench.workshop.elastic.backbone, self._encoded).all_tails()

    def _reshape(self, method: str, ratio: float) -> dict[str, Any]:
        run, workshop, reshaping = self.bench.run, self.bench.workshop, RESHAPINGS[method]
        asked = run.removed_parameters(ratio)
        calibration, start = self._calibration, time.perf_counter()
        made = reshaping.reshape(workshop.elastic.backbone, calibration, asked, reshaping.refits)
        seconds = time.perf_counter() - start
        scoring = DroppingScoring(made.backbone, self._encoded, None)
        found = _packed(scoring.scores(self._dense))
        return {**found, "flops": scoring.flops, "seconds": seconds, "left": made.removed - asked}

    def _use(self, method: str, ratio: float) -> dict[str, Any]:
        run, workshop = self.bench.run, self.bench.workshop
        dense, calibration, start = self._dense, self._calibration, time.perf_counter()
        widths = uniform(run.space, run.space.budget(ratio)).widths
        made = CONTEXTUAL[method].make(workshop.elastic.backbone, calibration, widths)
        seconds = time.perf_counter() - start
        scoring = DroppingScoring(made, self._encoded, None)
        found = _packed(scoring.scores(dense))
        added = sum(layer.ffn.predictor_parameters for layer in made.layers if isinstance(layer.ffn, ContextualFfn))
        return {**found, "flops": scoring.flops, "seconds": seconds, "left": -added}

    def _drop(self, dropping: str | None, share: float, base: Chosen | None) -> dict[str, Any]:
        elastic, space = self.bench.workshop.elastic, self.bench.run.space
        allocation = dense(space) if base is None else Allocation(base.widths)
        against, repair = self._dense, None if base is None else self.bench.repair(base.importance)
        with elastic.pruned(allocation, repair):
            calibration, start = self._calibration, time.perf_counter()
            way = None if dropping is None else DROPPINGS[dropping]
            opened = way and way.open(elastic.backbone, lambda: calibration, share)
            seconds = time.perf_counter() - start
            scoring = DroppingScoring(elastic.backbone, self._encoded, opened)
            found = _packed(scoring.scores(against))
        return {**found, "flops": scoring.flops, "seconds": seconds}

    def _measured(self, found: Mapping[str, Any]) -> Measured:
        asked = np.array([not sample.is_prose for sample in self.bench.items])
        return Measured(
            unpack_values(found["divergence"]),
            float(unpack_values(found["hits"])[asked].mean()),
            found["flops"],
            found.get("seconds", 0.0),
            found.get("left", 0),
        )


def _packed(scores: Scores) -> dict[str, Any]:
    return {"divergence": pack_values(scores.divergence), "hits": pack_values(scores.correct)}
