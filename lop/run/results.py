"""What a search found, as a run keeps it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lop.errors import LopError
from lop.run.run import Run
from lop.search.evaluation import Evaluation
from lop.search.tree import Depth
from lop.space.allocation import Allocation
from lop.storage.files import read_as
from lop.storage.fingerprint import check_fingerprints

_Scored = tuple[tuple[Allocation, Evaluation], ...]


@dataclass(frozen=True)
class Refined:
    """What was found near an allocation, with all refitted on what its layers see (`lop.stages.refine`).

    Attributes:
        best: the answer.
        evaluations: of all allocations, in commit order.
        confirmed: finalists on the samples kept back, the best by the search first.
    """

    near: Allocation
    best: Allocation
    evaluations: _Scored
    confirmed: _Scored

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "near": list(self.near.widths),
            "best": list(self.best.widths),
            "evaluations": entries(self.evaluations),
            "confirmed": entries(self.confirmed),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Refined":
        """The inverse of `as_dict`."""
        near, best = (Allocation(tuple(record[name])) for name in ("near", "best"))
        return cls(near, best, _evaluations(record["evaluations"]), _evaluations(record["confirmed"]))


@dataclass(frozen=True)
class Found:
    """One target's search result.

    Attributes:
        best: the answer.
        evaluation: the answer's.
        evaluations: of all of the tree's allocations, in commit order.
        depths: the tree's shape.
        confirmed: finalists on the samples kept back, the best by the search first; empty if none were.
        descended: samples scored in the descent that it started from.
        refined: what was found near the tree's answer, one round after the other.
    """

    target: float
    best: Allocation
    evaluation: Evaluation
    evaluations: _Scored
    depths: tuple[Depth, ...]
    confirmed: _Scored = ()
    descended: int = 0
    refined: tuple[Refined, ...] = ()

    @property
    def judged(self) -> _Scored:
        """What the answer was chosen among, in commit order."""
        return self.refined[-1].evaluations if self.refined else self.evaluations


def read_search(run: Run) -> list[Found]:
    """The search's results by target.

    Raises:
        LopError: the search has not been run, or was run with another model or other samples.
    """
    if not run.search_file.exists():
        raise LopError(f"{run.search_file} is missing: run `lop search` first")
    made_from, found = read_as(run.search_file, _parse_search)
    check_fingerprints(str(run.search_file), made_from, run.evaluation_fingerprints)
    return found


def _parse_search(data: Any) -> tuple[dict[str, str], list[Found]]:
    found = [
        Found(
            record["target"],
            *_answer(record["best"]),
            _evaluations(record["evaluations"]),
            tuple(Depth(**depth) for depth in record.get("depths", [])),  # Earlier searches did not tell.
            _evaluations(record.get("confirmed", [])),
            record.get("descent", {}).get("scored", 0),
            tuple(map(Refined.from_dict, record.get("refined", []))),
        )
        for record in data["targets"]
    ]
    return dict(data["fingerprints"]), found


def entries(scored: Iterable[tuple[Allocation, Evaluation]]) -> list[dict[str, Any]]:
    """Evaluations as plain JSON values."""
    return [{"widths": list(allocation.widths), **evaluation.as_dict()} for allocation, evaluation in scored]


def _answer(entry: dict[str, Any]) -> tuple[Allocation, Evaluation]:
    (found,) = _evaluations([{name: value for name, value in entry.items() if name != "ratios"}])
    return found


def _evaluations(records: list[dict[str, Any]]) -> _Scored:
    return tuple((Allocation(tuple(entry.pop("widths"))), Evaluation.from_dict(entry)) for entry in records)
