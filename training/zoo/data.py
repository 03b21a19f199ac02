"""What is kept of the zoo, in the repository: features, damages and accuracy of each member, and its searches' best."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lop.predictor.general_training import Measured
from lop.predictor.training import Pair
from lop.space.allocation import Allocation
from lop.space.features import Features
from lop.storage.files import read_json, write_json

FOLDER = Path(__file__).parent / "data"
_SEARCHES = FOLDER / "searches"


def load_members(names: Sequence[str] | None = None) -> list[Measured]:
    """The members by name; by default all of which damages or searches are kept, in alphabetical order."""
    paths = sorted(FOLDER.glob("*.json")) if names is None else [FOLDER / f"{name}.json" for name in names]
    found = [_measured(path) for path in paths]
    return [member for member in found if names is not None or member.is_measured or member.pairs]


def load_searches(name: str) -> dict[float, list[Allocation]]:
    """By target the best allocations that a model's own search has evaluated, the best first."""
    path = _SEARCHES / f"{name}.json"
    found = read_json(path) if path.exists() else {}
    return {float(target): [Allocation(tuple(widths)) for widths in best] for target, best in found.items()}


def save_searches(name: str, found: Mapping[float, Sequence[Allocation]]) -> None:
    """Keeps the best of a model's search, beside what is kept for other targets."""
    known = {**load_searches(name), **found}
    _SEARCHES.mkdir(exist_ok=True)
    rows = {str(target): [allocation.widths for allocation in known[target]] for target in sorted(known)}
    write_json(_SEARCHES / f"{name}.json", rows)


def _measured(path: Path) -> Measured:
    found = read_json(path)
    damages = np.array(found["damages"], dtype=np.float64)  # JSON's null, for what was not measured, becomes NaN.
    features = Features(np.array(found["curves"]), np.array(found["scalars"]))
    return Measured(found["name"], features, damages, tuple(_pairs(found["name"], found["neurons"])))


def _pairs(name: str, neurons: int) -> Iterator[Pair]:
    for best in load_searches(name).values():
        for allocation in best:
            ratios = [1 - width / neurons for width in allocation.widths]
            yield Pair(float(np.mean(ratios)), tuple(ratios))
