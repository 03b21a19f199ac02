"""What is kept of the zoo, in the repository: features, damages and accuracy of each member."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lop.predictor.general_training import Measured
from lop.space.features import Features
from lop.storage.files import read_json

FOLDER = Path(__file__).parent / "data"


def load_members(names: Sequence[str] | None = None) -> list[Measured]:
    """The members by name; by default all whose damages were measured, in alphabetical order."""
    paths = sorted(FOLDER.glob("*.json")) if names is None else [FOLDER / f"{name}.json" for name in names]
    found = [_measured(path) for path in paths]
    return [member for member in found if names is not None or np.isfinite(member.damages).any()]


def _measured(path: Path) -> Measured:
    found = read_json(path)
    damages = np.array(found["damages"], dtype=np.float64)  # JSON's null, for what was not measured, becomes NaN.
    return Measured(found["name"], Features(np.array(found["curves"]), np.array(found["scalars"])), damages)
