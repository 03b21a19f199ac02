"""What answers targets for a model: its own predictor, or, where it was never searched, the general one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lop.space.allocation import Allocation, Space, of_ffns
from lop.space.size import ModelSize


class Answering(Protocol):
    """A predictor of one model, as far as targets are concerned; see `lop.predictor.predictor.Predictor`."""

    @property
    def space(self) -> Space:
        """The model's allocations."""

    @property
    def size(self) -> ModelSize:
        """The dense model's numbers."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """What it was made from."""

    @property
    def source(self) -> str | None:
        """Where its answers come from, if not from the model's own search."""

    def allocate(self, budget: int) -> Allocation:
        """The allocation of `budget`."""


@dataclass(frozen=True)
class Unsearched:
    """A model that was calibrated, and at most probed.

    Attributes:
        of_neurons: the allocation of a budget, of FFNs alone.
        fingerprints: of what the features were made from.
        probes: evaluations that were spent on it.
        best: by budget, the best of a few allocations that were compared.
    """

    of_neurons: Callable[[Space, int], Allocation]
    space: Space
    size: ModelSize
    fingerprints: Mapping[str, str]
    probes: int = 0
    best: Mapping[int, Allocation] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """That it is the general predictor, and with how many probes."""
        return f"general, {self.probes} probes"

    def allocate(self, budget: int) -> Allocation:
        """The allocation of `budget` that is expected to cost least, or did where some were compared.

        Raises:
            LopError: the budget is not one of the space's.
        """
        known = self.best.get(budget)
        if known is not None and max(known.widths) <= self.space.max_width(budget):
            return known
        return of_ffns(self.space, budget, self.of_neurons)
