"""Cells of a table: a way to prune at a target, scored on the benchmark once and kept."""

import base64
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from lop.checkpoint.recoveries import RECOVERIES, Recovery
from lop.checkpoint.recovery import recover_elastic
from lop.methods.registry import RESHAPINGS
from lop.model.encoding import Encoded
from lop.model.importance import SURVEYS_OF, importance, of_groups, order
from lop.model.samples import Sample, fingerprint_samples
from lop.model.statistics import NeuronStatistics
from lop.run.building import Materials, Workshop
from lop.run.run import Run
from lop.search.scoring import Scoring
from lop.space.allocation import Allocation
from lop.storage.files import read_as, write_json
from lop.storage.fingerprint import fingerprint

Item = TypeVar("Item")
Result = TypeVar("Result")


class Spread(Protocol):
    """Does independent pieces of work, side by side where there are workers."""

    def __call__(
        self, build: Callable[[], Callable[[Item], Result]], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Pairs of item and result, as they come; `build` makes a worker, and is picklable."""


@dataclass(frozen=True)
class Cell:
    """What to prune: the neurons that an importance ranks last, down to these widths.

    Attributes:
        bias: with FLAP's, where the run's search scores without recovery; else all have what it scores with.
        reshaped: by which of `RESHAPINGS`, and to how many parameters less at least, the dense model is reshaped
            instead.
    """

    importance: str
    widths: tuple[int, ...]
    bias: bool = False
    reshaped: tuple[str, int] | None = None


@dataclass(frozen=True)
class Scored:
    """What a cell's model writes.

    Attributes:
        hits: [n] bool, which of the samples it answers exactly.
        sort_seconds: to rank and permute all layers' neurons by the importance; once for a model.
        prune_seconds: to take the widths, and to compute the bias or to refit, or to reshape the model; each target.
    """

    hits: np.ndarray
    sort_seconds: float
    prune_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        packed = base64.b64encode(np.packbits(self.hits).tobytes()).decode()
        return {"hits": packed, "sort_seconds": self.sort_seconds, "prune_seconds": self.prune_seconds}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], count: int) -> "Scored":
        """The inverse of `as_dict` for `count` samples."""
        bits = np.frombuffer(base64.b64decode(data["hits"]), np.uint8)
        return cls(np.unpackbits(bits, count=count).astype(bool), data["sort_seconds"], data["prune_seconds"])


class CellWorker:
    """Holds the model and encoded samples, and scores cells on them, with the recovery that the search scores with."""

    def __init__(self, materials: Materials, statistics: NeuronStatistics, samples: Sequence[Sample]) -> None:
        self._workshop = workshop = Workshop(materials)
        self._materials, self._statistics = materials, statistics
        self._elastic = workshop.elastic
        self._scoring = Scoring(workshop.elastic.backbone, workshop.encode(samples))

    def __call__(self, cell: Cell) -> Scored:
        """Scores one cell."""
        start = time.perf_counter()
        if cell.reshaped:
            method, removed = cell.reshaped
            refits = RECOVERIES[own_of_reshaping(self._recovery, method)].refits
            made = RESHAPINGS[method].reshape(self._elastic.backbone, self._calibration, removed, refits)
            seconds = time.perf_counter() - start
            return Scored(Scoring(made.backbone, self._scoring.encoded).scores().correct, 0.0, seconds)
        statistics, has_groups = self._statistics, self._materials.groups is not None
        groups = order(of_groups(statistics, cell.importance)) if has_groups else None
        self._elastic.sort(order(importance(cell.importance, statistics)), groups)
        sorted_at = time.perf_counter()
        recovery = own_recovery(self._recovery, bias=cell.bias)
        calibration = self._calibration if RECOVERIES[recovery].refits else None
        recover_elastic(
            self._elastic, Allocation(cell.widths), recovery, means=self._statistics.mean, calibration=calibration
        )
        pruned_at = time.perf_counter()
        hits = self._scoring.scores().correct
        self._elastic.restore()
        return Scored(hits, sorted_at - start, pruned_at - sorted_at)

    @property
    def _recovery(self) -> Recovery:
        return self._materials.config.scored_recovery

    @cached_property
    def _calibration(self) -> Encoded:
        return self._workshop.encode(self._materials.calibration)


def own_recovery(scored: Recovery, *, bias: bool) -> Recovery:
    """What a choice is compared with: allocations are good for what they were scored with, so all have the same.

    Where they were scored without recovery, each is as it was published.

    Args:
        scored: what the search scores with.
        bias: whether the method was published with one.
    """
    return scored if scored != "none" else "bias" if bias else "none"


def own_of_reshaping(scored: Recovery, method: str) -> Recovery:
    """The same of a method that reshapes the model."""
    return "refit" if RECOVERIES[scored].refits and RESHAPINGS[method].refits else "none"


def recovered_in_words(run: Run) -> str:
    """How every method is compared; see `own_recovery`."""
    recovery = run.config.scored_recovery
    if recovery == "none":
        return "as it was published (FLAP with bias, the others without recovery)"
    return f"with recovery `{recovery}`, as the search has it"


def score_cells(
    run: Run, cells: Sequence[Cell], samples: Sequence[Sample], spread: Spread, *, progress: bool = True
) -> dict[Cell, Scored]:
    """Scores every cell once; what an earlier call has scored is read from the run's folder.

    Raises:
        LopError: the statistics are missing, or belong to another model.
    """
    made_from = [run.evaluation_fingerprints, fingerprint_samples(samples)]
    if run.config.scored_recovery != "none":
        made_from.append({"recovered": "as the search scores"})  # Which earlier cells were not.
    # Only where it is there, so that cells from before anything was reshaped keep their fingerprint.
    said = {cell: {name: value for name, value in asdict(cell).items() if value is not None} for cell in cells}
    files = {cell: run.folder / "cells" / f"{fingerprint([made_from, said[cell]])}.json" for cell in cells}
    waiting = [cell for cell in files if not files[cell].exists()]
    # Cells of one importance stand together: sorting is what a change of it costs.
    waiting.sort(key=lambda cell: cell.importance)
    kinds = dict.fromkeys(kind for cell in waiting for kind in SURVEYS_OF.get(cell.importance, ()))
    results = spread(partial(CellWorker, Materials.of(run), run.surveyed(kinds), samples), waiting)
    for cell, scored in tqdm(results, desc="tables", total=len(waiting), unit="cell", disable=not progress):
        write_json(files[cell], scored.as_dict())
        run.keep(files[cell])
    return {cell: read_as(path, partial(Scored.from_dict, count=len(samples))) for cell, path in files.items()}
