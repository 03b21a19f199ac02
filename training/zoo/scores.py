"""What allocations of the zoo's models cost, as far as it was measured: a file a model under `results/transfer`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lop.errors import LopError
from lop.model.find import EMBEDDED
from lop.search.evaluation import Evaluation
from lop.search.racing import pack_values, unpack_values
from lop.space.allocation import Allocation, Space
from lop.storage.files import read_json, write_json
from training.zoo.make import lab
from training.zoo.measure import Lab
from training.zoo.members import MEMBERS

RESULTS = Path(__file__).parents[2] / "results" / "transfer"
MAX_RATIO = 0.95


@dataclass
class Scores:
    """What is known of a model's allocations, and how to measure more.

    Attributes:
        work: where the weights are; None if there are none, and all that is asked for must be known.
    """

    name: str
    work: Path | None

    def __post_init__(self) -> None:
        self.space = space_of(self.name)
        self.known: dict[str, Any] = read_json(self._path) if self._path.exists() else {}
        self._lab: Lab | None = None

    @property
    def _path(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def lab(self) -> Lab:
        """The model itself.

        Raises:
            LopError: its weights are needed, and nobody has said where they are.
        """
        if self._lab is None:
            if self.work is None and self.name != EMBEDDED:
                raise LopError(f"a score of {self.name} is missing, and its weights are: name --work")
            self._lab = lab(self.name, (self.work or Path("runs/zoo")).resolve())
        return self._lab

    def test(self, allocation: Allocation) -> float:
        """The mean KL on the test samples."""
        return float(self._get(_key("test", allocation), lambda: _rounded(self.lab.test(allocation))))

    def reward(self, allocation: Allocation) -> float:
        """The mean KL on the samples that searches see."""
        return float(self._get(_key("reward", allocation), lambda: self.rewarded(allocation)))

    def rewarded(self, allocation: Allocation) -> float:
        """The same, measured now."""
        return _rounded(self.lab.reward(allocation))

    def evaluation(self, allocation: Allocation) -> Evaluation:
        """The KL on each of these samples."""
        values = self._get(_key("itemised", allocation), lambda: pack_values(-self.lab.itemised(allocation)))
        mean = -float(unpack_values(values).mean())
        return Evaluation(accuracy=0.0, log_probability=0.0, divergence=mean, values=values)

    def knows(self, split: str, allocation: Allocation) -> bool:
        """Whether a score was measured."""
        return _key(split, allocation) in self.known

    def keep(self, split: str, allocation: Allocation, value: float) -> None:
        """Keeps what somebody else has measured."""
        self._get(_key(split, allocation), lambda: value)

    def published(self, method: str, target: float) -> Allocation:
        """What a method reads off the model's statistics."""
        found = self._get(f"{method} {target}", lambda: list(self.lab.published(method, target).widths))
        return Allocation(tuple(found))

    def _get(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known[key] = make()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, self.known)
        return self.known[key]


def _key(split: str, allocation: Allocation) -> str:
    return f"{split} " + " ".join(map(str, allocation.widths))


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def space_of(name: str) -> Space:
    """The allocations of a member of the zoo or of `tiny`."""
    if name == EMBEDDED:
        return Space(12, 160, 8, MAX_RATIO)
    shape = MEMBERS[name].shape
    return Space(shape.layers, shape.neurons, MEMBERS[name].granularity, MAX_RATIO)
