"""Ways to compute less that leave the weights, on the test samples, against LOP's widths that compute as much."""

import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
from tqdm import tqdm

from lop.checkpoint.recovery import recover_elastic
from lop.methods.registry import CONTEXTUAL, DROPPINGS
from lop.model.beyond.contextual import ContextualFfn
from lop.model.beyond.flops import flops
from lop.model.encoding import Encoded
from lop.model.samples import Sample, fingerprint_samples
from lop.predictor.predictor import Predictor
from lop.report.cells import Spread
from lop.run.building import Materials, Workshop
from lop.run.prediction import open_predictor
from lop.run.run import Run
from lop.search.dropping import DroppingScoring
from lop.search.racing import pack, unpack
from lop.search.scoring import Scoring
from lop.space.allocation import Allocation, dense, uniform
from lop.storage.files import read_as, write_json
from lop.storage.fingerprint import fingerprint, fingerprint_file

SHARES = (0.33, 0.5, 0.75)
# How finely a ratio is looked for that computes as much.
_STEPS = 1000


@dataclass(frozen=True)
class Way:
    """A way to compute less.

    Attributes:
        method: of `DROPPINGS` or `CONTEXTUAL`.
        share: of images' tokens that it drops, or of all neurons that a token does not use.
        base: the target of the predictor's widths that it is applied to; 0 is the dense model.
    """

    method: str
    share: float
    base: float = 0.0


@dataclass(frozen=True)
class Answered:
    """What a way's model answers, and LOP's predictor's widths alone that compute at most as much.

    Attributes:
        hits: [n] bool, which of the samples are answered exactly.
        flops: of the language backbone to read them, as a share of the dense model's.
        added: parameters that are there on top of the weights.
        seconds: to set it up.
        ratio: the pruning ratio of LOP's widths; None if its leanest compute more.
        alone: [n] bool, what these answer exactly; all False without them.
    """

    hits: np.ndarray
    flops: float
    added: int
    seconds: float
    ratio: float | None
    alone: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "hits": pack(self.hits), "alone": pack(self.alone)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], count: int) -> "Answered":
        """The inverse of `as_dict` for `count` samples."""
        return cls(**{**data, **{name: unpack(data[name], count) for name in ("hits", "alone")}})


def compared_ways(run: Run) -> list[Way]:
    """Those of the methods that the config names: on the dense model, and for images' tokens on LOP's widths, too."""
    settings = run.config.compare
    named, targets = settings.methods or (), settings.targets
    applied = list(product(settings.shares or SHARES, (0.0, *targets)))
    found = [Way(name, *each) for name in DROPPINGS if name in named for each in applied]
    return found + [Way(name, target) for name in CONTEXTUAL if name in named for target in targets]


def score_ways(
    run: Run, ways: Sequence[Way], samples: Sequence[Sample], spread: Spread, *, progress: bool = True
) -> dict[Way, Answered]:
    """Scores every way once; what an earlier call has scored is read from the run's folder.

    Raises:
        LopError: the statistics or the predictor are missing, or belong to another model.
    """
    if not ways:
        return {}
    made_from = [
        run.evaluation_fingerprints,
        run.space.as_dict(),
        fingerprint_samples(samples),
        fingerprint_file(run.predictor_folder / "predictor.json"),
        run.config.scored_recovery,
    ]
    files = {way: run.folder / "operations" / f"{fingerprint([made_from, asdict(way)])}.json" for way in ways}
    waiting = [way for way in ways if not files[way].exists()]
    predictor = open_predictor(run, run.predictor_folder)
    results = spread(partial(WayWorker, Materials.of(run), predictor, samples), waiting)
    for way, answered in tqdm(results, desc="operations", total=len(waiting), unit="way", disable=not progress):
        write_json(files[way], answered.as_dict())
        run.keep(files[way])
    return {way: read_as(path, partial(Answered.from_dict, count=len(samples))) for way, path in files.items()}


class WayWorker:
    """Holds the model and encoded samples, and scores ways on them, with the recovery that the search scores with."""

    def __init__(self, materials: Materials, predictor: Predictor, samples: Sequence[Sample]) -> None:
        self._workshop = workshop = Workshop(materials)
        self._materials, self._predictor, self._space = materials, predictor, predictor.space
        self._elastic = workshop.elastic
        self._encoded = workshop.encode(samples)
        groups = [(batch.groups, len(batch.places)) for batch in self._encoded.batches]
        self._lengths = [group.length for mine, _ in groups for group in mine for _ in range(group.count)]
        self._predicted = sum(predicted for _, predicted in groups)
        self._known: dict[Allocation, np.ndarray] = {}

    def __call__(self, way: Way) -> Answered:
        """Scores one way, and what computes as much."""
        found = self._contextual(way) if way.method in CONTEXTUAL else self._dropping(way)
        alone = self._of_as_many(found.flops)
        found = replace(found, flops=found.flops / self._flops(dense(self._space)))
        if alone is None:
            return found
        ratio = self._space.ratio_of(alone.widths)
        return replace(found, ratio=ratio, alone=self._hits(alone))

    def _dropping(self, way: Way) -> Answered:
        calibration = self._calibration
        self._take(self._predicted_for(way.base))
        start = time.perf_counter()
        reading = DROPPINGS[way.method].open(self._elastic.backbone, lambda: calibration, way.share)
        seconds = time.perf_counter() - start
        scoring = DroppingScoring(self._elastic.backbone, self._encoded, reading)
        hits = scoring.scores().correct
        self._elastic.restore()
        return Answered(hits, scoring.flops, 0, seconds, None, np.zeros_like(hits))

    def _contextual(self, way: Way) -> Answered:
        calibration, ffns = self._calibration, self._space.ffns
        start = time.perf_counter()
        made = CONTEXTUAL[way.method].make(
            self._elastic.backbone, calibration, uniform(ffns, ffns.budget(way.share)).widths
        )
        seconds = time.perf_counter() - start
        added = sum(layer.ffn.predictor_parameters for layer in made.layers if isinstance(layer.ffn, ContextualFfn))
        scoring = DroppingScoring(made, self._encoded, None)
        hits = scoring.scores().correct
        return Answered(hits, scoring.flops, added, seconds, None, np.zeros_like(hits))

    def _of_as_many(self, wanted: float) -> Allocation | None:
        """The largest of the predictor's allocations that computes at most as much."""
        ratios = np.linspace(0, self._space.max_target, _STEPS + 1).tolist()
        index = bisect_left(ratios, -wanted, key=lambda ratio: -self._flops(self._predicted_for(ratio)))
        return None if index > _STEPS else self._predicted_for(ratios[index])

    def _predicted_for(self, ratio: float) -> Allocation:
        budget = self._space.budget(ratio)
        return dense(self._space) if budget == self._space.whole else self._predictor.allocate(budget)

    def _hits(self, allocation: Allocation) -> np.ndarray:
        if allocation not in self._known:
            self._take(allocation)
            self._known[allocation] = Scoring(self._elastic.backbone, self._encoded).scores().correct
            self._elastic.restore()
        return self._known[allocation]

    def _take(self, allocation: Allocation) -> None:
        """The allocation's widths, with recovery where anything is pruned."""
        recovery = self._materials.config.scored_recovery if allocation != dense(self._space) else "none"
        means = self._materials.means
        recover_elastic(self._elastic, allocation, recovery, means=means, calibration=self._calibration)

    def _flops(self, allocation: Allocation) -> int:
        with self._elastic.pruned(allocation):
            backbone = self._elastic.backbone
            return flops(backbone, [self._lengths] * len(backbone.layers), self._predicted)

    @cached_property
    def _calibration(self) -> Encoded:
        return self._workshop.encode(self._materials.calibration)
