"""What worker processes build once: the model in its elastic form, encoded samples, an evaluator of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from lop.checkpoint.recovery import repair_for
from lop.model.adapter import QwenVL, load_model
from lop.model.elastic import ElasticModel, Repair
from lop.model.encoding import Encoded, encode
from lop.model.find import find_model
from lop.model.samples import Sample
from lop.run.config import Config
from lop.search.descent import Few
from lop.search.evaluation import Scorer, Scorers
from lop.search.evaluator import Evaluator
from lop.search.racing import Racing, split

if TYPE_CHECKING:
    from lop.run.run import Run


@dataclass(frozen=True)
class Materials:
    """What an elastic model is made of, as plain values that travel to a worker.

    Attributes:
        config: settled (`lop.run.run.Run.settled`).
        order: [L, F] neurons of each layer, the most important first.
        means: [L, F] `E[h]` in the dense model's numbering.
        calibration: the samples that weights are refitted on.
        groups: [L, K] groups of each layer's attention, the most important first; None where they are not pruned.
    """

    config: Config
    order: np.ndarray
    means: np.ndarray
    calibration: tuple[Sample, ...]
    groups: np.ndarray | None = None

    @classmethod
    def of(cls, run: "Run") -> "Materials":
        """A run's.

        Raises:
            LopError: it has no statistics, or those of another model or other samples.
        """
        return cls(run.settled, run.order, run.statistics.mean, tuple(run.samples.calibration), run.group_order)


class Workshop:
    """A model with its processor and its elastic form, and what is made with them.

    Attributes:
        model: dense, until `elastic` is first asked for, which stands on its weights.
    """

    def __init__(self, materials: Materials) -> None:
        config = materials.config
        torch.set_num_threads(config.threads)
        self._materials = materials
        self.model: QwenVL = load_model(find_model(config.model), device=config.device, dtype=config.dtype)

    @cached_property
    def elastic(self) -> ElasticModel:
        """The model in a form that can be pruned."""
        given = self._materials
        return ElasticModel(self.model, given.order, compiled=given.config.compile, groups=given.groups)

    def encode(self, samples: Sequence[Sample], *, rounds: Sequence[np.ndarray] | None = None) -> Encoded:
        """Samples, encoded as the config says; see `lop.model.encoding.encode`."""
        config = self._materials.config
        return encode(self.model, samples, batch_tokens=config.batch_tokens, rounds=rounds, images=config.images)

    def repair(self) -> Repair | None:
        """What candidates of the config's search are scored with; for `refit` it takes a pass over the samples."""
        config, materials = self._materials.config, self._materials
        return repair_for(
            config.scored_recovery,
            self.elastic,
            means=materials.means,
            calibration=lambda: self.encode(materials.calibration),
            cache_bytes=config.refit_bytes,
            attention=materials.groups is not None,
        )

    def evaluator(self, samples: Sequence[Sample], repair: Repair | None) -> Evaluator:
        """An evaluator of the config's search."""
        config = self._materials.config
        races = config.search.racing
        racing = Racing(races.rounds, races.confidence, config.search.reward) if races else None
        return Evaluator(
            self.elastic,
            self.encode(samples, rounds=racing.parts(len(samples), seed=config.seed) if racing else None),
            repair=repair,
            racing=racing,
            divergence=config.search.needs_divergence,
            cache_bytes=config.cache_bytes,
        )


def build_scorer(materials: Materials, samples: Sequence[Sample], kept_back: Sequence[Sample] = ()) -> Scorer:
    """What evaluates a search's candidates; what each worker process calls once.

    Args:
        kept_back: samples to confirm the search's answer on.
    """
    workshop, settings = Workshop(materials), materials.config.search
    repair = workshop.repair()

    def scorer(chosen: Sequence[Sample], *, divergence: bool) -> Evaluator:
        return Evaluator(workshop.elastic, workshop.encode(chosen), repair=repair, divergence=divergence)

    return Scorers(
        workshop.evaluator(samples, repair),
        scorer(kept_back, divergence=settings.needs_divergence) if kept_back else None,
        {few: scorer(chosen, divergence=True) for few, chosen in few_samples(materials.config, samples).items()},
    )


def few_samples(config: Config, samples: Sequence[Sample]) -> dict[Few, list[Sample]]:
    """Those of the search's samples that a descent looks at, equally many of each; none if there is no descent."""
    descent = config.search.descends
    if descent is None:
        return {}
    count = min(descent.samples, len(samples) // len(Few))
    drawn = [samples[index] for index in split(len(samples), count * len(Few), seed=config.seed)]
    return dict(zip(Few, (drawn[:count], drawn[count:]), strict=True))
