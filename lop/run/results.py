"""What a search found, as a run keeps it."""

from dataclasses import dataclass
from typing import Any

from lop.errors import LopError
from lop.run.run import Run
from lop.search.evaluation import Evaluation
from lop.search.tree import Depth
from lop.space.allocation import Allocation
from lop.storage.files import read_as
from lop.storage.fingerprint import check_fingerprints


@dataclass(frozen=True)
class Found:
    """One target's search result.

    Attributes:
        best: the answer.
        evaluations: of all allocations, in commit order.
        depths: the tree's shape.
        confirmed: finalists on the samples kept back, the best by the search first; empty if none were.
        descended: samples scored in the descent that it started from.
    """

    target: float
    best: Allocation
    evaluations: tuple[tuple[Allocation, Evaluation], ...]
    depths: tuple[Depth, ...]
    confirmed: tuple[tuple[Allocation, Evaluation], ...] = ()
    descended: int = 0


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
            Allocation(tuple(record["best"]["widths"])),
            _evaluations(record["evaluations"]),
            tuple(Depth(**depth) for depth in record.get("depths", [])),  # Earlier searches did not tell.
            _evaluations(record.get("confirmed", [])),
            record.get("descent", {}).get("scored", 0),
        )
        for record in data["targets"]
    ]
    return dict(data["fingerprints"]), found


def _evaluations(entries: list[dict[str, Any]]) -> tuple[tuple[Allocation, Evaluation], ...]:
    return tuple((Allocation(tuple(entry.pop("widths"))), Evaluation.from_dict(entry)) for entry in entries)
