"""What each method of the tables takes, and how much faster than the paper's reference that is."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lop.methods.method import Need, Seconds, Side
from lop.methods.registry import REFERENCE
from lop.report.cells import Cell, Scored
from lop.report.entries import Entry
from lop.run.run import Run
from lop.run.surveys import extra_seconds
from lop.storage.files import read_as


@dataclass(frozen=True)
class Speed:
    """A method's seconds, medians over targets and seeds.

    Attributes:
        paper: FLAP's calibrate + allocate + sort + prune over what LOP spends once its predictor is trained,
            allocate + prune; baselines by all four.
        cached: allocate + prune for everyone: statistics and order are kept for all.
    """

    method: str
    seconds: Seconds
    paper: float
    cached: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "method": self.method,
            **asdict(self.seconds),
            "speedup_paper": self.paper,
            "speedup_cached": self.cached,
        }


def speeds(run: Run, entries: Sequence[Entry], scored: Mapping[Cell, Scored]) -> Iterator[Speed]:
    """Of every method of the tables, in the order in which they come."""
    calibrate = _calibrate_seconds(run)
    by_method: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.side is not Side.ARCHITECTURE:
            by_method[entry.method].append(entry)

    def seconds(mine: Sequence[Entry]) -> Seconds:
        needs = mine[0].needs
        return Seconds(
            calibrate=(calibrate if Need.ACTIVATIONS in needs else 0.0) + extra_seconds(run, needs),
            allocate=statistics.median(entry.allocate_seconds for entry in mine),
            sort=statistics.median(scored[entry.cell].sort_seconds for entry in mine),
            prune=statistics.median(scored[entry.cell].prune_seconds for entry in mine),
        )

    spent = {method: seconds(mine) for method, mine in by_method.items()}
    reference = spent.get(REFERENCE)
    for method, own in spent.items():
        if reference is None:
            yield Speed(method, own, float("nan"), float("nan"))
            continue
        # As the paper counts: LOP's statistics and order are there when a target is asked for, a baseline's are not.
        is_ready = by_method[method][0].side is Side.LOP
        yield Speed(method, own, reference.total / (own.each if is_ready else own.total), reference.each / own.each)


def _calibrate_seconds(run: Run) -> float:
    """As the run's comparison has measured them, or the stage itself."""
    results = run.folder / "results.json"
    measured = read_as(results, _measured) if results.exists() else []
    return max(measured, default=run.seconds().get("calibrate", 0.0))


def _measured(results: Any) -> list[float]:
    return [float(entry["calibrate"]) for entry in results["seconds"]]
