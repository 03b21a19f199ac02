"""What a way to prune is, whatever it is: what it needs, how it chooses, and what it spends."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lop.errors import LopError
from lop.search.tree import TreeOptions
from lop.space.allocation import Allocation, Space, of_ffns

# The settings of a run name methods, so their registry is read with no torch behind it.
if TYPE_CHECKING:
    from lop.model.statistics import NeuronStatistics
    from lop.search.evaluation import Evaluation
    from lop.search.loop import Workers

# What an allocation is worth: more is better, later entries break ties.
Worth = tuple[float, ...]


class Side(StrEnum):
    """Whose a row of the tables is."""

    DENSE = "dense"
    BASELINE = "baseline"
    RIVAL = "rival"
    LOP = "lop"
    ARCHITECTURE = "architecture"

    @property
    def opponents(self) -> frozenset["Side"]:
        """Whom it is held against: LOP's methods and networks against all others, the others against LOP's."""
        others = frozenset({Side.BASELINE, Side.RIVAL})
        if self is Side.DENSE:
            return frozenset()
        return frozenset({Side.LOP}) if self in others else others


class Need(StrEnum):
    """What must be there before a method can choose."""

    ACTIVATIONS = "activations"  # Statistics of the calibration samples; without it, the weights are enough.
    SPECTRA = "spectra"  # `NeuronStatistics.exponents`.
    GRADIENTS = "gradients"  # The surveys `element` and `vector` (`lop.model.taylor`).
    SEQUENCES = "sequences"  # The survey `squares` (`lop.model.sequences`).
    ATTENTION = "attention"  # The weights by which heads look from the calibration samples' tokens at others.
    HEADS = "heads"  # The surveys `said_variance` and `out_l2` (`lop.model.said`).
    HEAD_GRADIENTS = "head-gradients"  # The surveys `head_element` and `head_vector` (`lop.model.taylor`).
    STATES = "states"  # The calibration samples' states before and after layers.
    TRAINING = "training"  # A part of the model trained on them.
    REMOVAL = "removal"  # The surveys `order` and `errors` (`lop.model.removal`).
    EVALUATIONS = "evaluations"  # A search of its own: `Method.search`.
    SEARCH = "search"  # LOP's search.
    PREDICTOR = "predictor"  # What was trained on it.


# Needs that are met by surveys: further passes over the calibration samples.
SURVEYED = frozenset({Need.GRADIENTS, Need.SEQUENCES, Need.REMOVAL, Need.HEADS, Need.HEAD_GRADIENTS})


@dataclass(frozen=True)
class Seconds:
    """What a method takes.

    Attributes:
        calibrate: once for a model: to collect the statistics, and to measure the spectra where they are read.
        allocate: to choose the widths of one target. A search's own time; a predictor has that search, and the
            training, behind it once for all targets.
        sort: to rank and permute the neurons by the method's scores; once for a model.
        prune: to take the widths, and to compute the bias; for each target.
    """

    calibrate: float
    allocate: float
    sort: float
    prune: float

    @property
    def apply(self) -> float:
        """From the widths to the pruned model."""
        return self.sort + self.prune

    @property
    def each(self) -> float:
        """Of every further target, where statistics and order are kept."""
        return self.allocate + self.prune

    @property
    def total(self) -> float:
        """Of the first target."""
        return self.calibrate + self.allocate + self.sort + self.prune


@dataclass(frozen=True)
class Choice:
    """What a method does with a budget.

    Attributes:
        importance: whose order the neurons are kept in.
        bias: whether the pruned neurons are replaced by their mean contribution.
        seconds: that the widths took to choose.
    """

    allocation: Allocation
    importance: str
    bias: bool
    seconds: float


class Allocates(Protocol):
    """A predictor, as far as a method sees it."""

    def allocate(self, budget: int) -> Allocation:
        """The allocation of a budget."""


@dataclass(frozen=True)
class Given:
    """What there is of a model when a method chooses; what the method does not need may be missing.

    Attributes:
        importance: the run's own, for methods that bring none.
        found: by budget, what the search that the method stands for has found, and the seconds that took.
    """

    space: Space
    importance: str
    statistics: "NeuronStatistics | None" = None
    found: Mapping[int, tuple[Allocation, float]] = field(default_factory=dict)
    predictor: Allocates | None = None


@dataclass(frozen=True)
class Reward:
    """What a search may ask, and how much of it.

    Attributes:
        evaluations: to spend on a budget, in units of all reward samples.
        levels: widths at which a layer is scanned alone.
        options: of LOP's tree.
        weights: finds [L, F], the sum of squares of each neuron's weights, in the order in which neurons are kept.
        reward, tie_breaker: of an evaluation, more is better.
        evaluate: an allocation, on the first share of the reward samples, which are shuffled.
        workers: evaluate on all samples; with divergences where `with_divergence` does.
    """

    evaluations: int
    levels: int
    options: TreeOptions
    weights: Callable[[], np.ndarray]
    reward: "Callable[[Evaluation], float]"
    tie_breaker: "Callable[[Evaluation], float]"
    evaluate: "Callable[[Allocation, float], Evaluation]"
    workers: "Callable[[], Workers]"
    with_divergence: "Callable[[], Workers]"

    def worth(self, allocation: Allocation, share: float = 1.0) -> Worth:
        """Evaluates an allocation."""
        return self.rank(self.evaluate(allocation, share))

    def rank(self, evaluation: "Evaluation") -> Worth:
        """What an evaluation is worth."""
        return self.reward(evaluation), self.tie_breaker(evaluation)


@dataclass(frozen=True)
class Discovery:
    """What a search has found for a budget.

    Attributes:
        curve: pairs (evaluations spent, best reward so far); evaluations in units of all reward samples.
    """

    budget: int
    best: Allocation
    worth: Worth
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Search:
    """How a method searches.

    Attributes:
        run: finds an allocation for each budget, from a seed: a function of its arguments.
        is_shared: one search serves all budgets, and nothing in it is drawn by chance.
        shares: of the samples that it evaluates on.
    """

    run: Callable[[Space, Reward, Sequence[int], int], Iterator[Discovery]]
    is_shared: bool = False
    shares: tuple[float, ...] = (1.0,)


class Root(StrEnum):
    """Where LOP's search gets what it starts from."""

    READ = "read"  # From the statistics, by `Method.start`.
    SCANNED = "scanned"  # By the search itself, from a scan.
    PREDICTED = "predicted"  # From the predictor for all models (`lop.run.prediction.unsearched`).
    FOUND = "found"  # By the method's own search, which must have been run for the target.


@dataclass(frozen=True)
class Method:
    """A way to prune.

    Attributes:
        name: in configs and reports.
        choose: the widths for a budget, with the seconds that took; see `reading` and `look_up`.
        importance: the key in `IMPORTANCES` or `OF_BOTH` of the order that it prunes in; None takes the run's own.
        bias: it replaces the pruned neurons by their mean contribution, as a bias of `down_proj`.
        root: where LOP's search gets it from, if it may start from it.
        start: the allocation that it suggests to the search; methods that prune all layers alike when used by
            themselves may tell layers apart here.
        is_of_axes: it spreads a budget over all axes; the others know FFNs alone (`of_ffns`).
        search: how it searches, if it does.
        is_compared: it has rows in the tables; otherwise it is in the curves alone.
        in_report: it is one of the few that `report.md` compares.
        has_profile: its widths differ from layer to layer in a way worth a picture.
        label: in pictures; the name if None.
        in_curves: the label where searches are compared with each other, if it is one.
    """

    name: str
    side: Side
    choose: Callable[[Given, int], tuple[Allocation, float]]
    needs: frozenset[Need] = frozenset({Need.ACTIVATIONS})
    importance: str | None = None
    bias: bool = False
    root: Root | None = None
    start: "Callable[[NeuronStatistics, Space, int], Allocation] | None" = None
    is_of_axes: bool = False
    search: Search | None = None
    is_compared: bool = True
    in_report: bool = False
    has_profile: bool = False
    label: str | None = None
    in_curves: str | None = None

    def __call__(self, given: Given, budget: int) -> Choice:
        """What it does with `budget`.

        Raises:
            LopError: what it needs is missing.
        """
        allocation, seconds = self.choose(given, budget)
        return Choice(allocation, self.importance or given.importance, self.bias, seconds)

    def suggest(self, statistics: "NeuronStatistics", space: Space, budget: int) -> Allocation:
        """What its `start` is for a budget."""
        assert self.start
        return _allocated(self.start, statistics, space, budget, is_of_axes=self.is_of_axes)


def reading(
    allocate: "Callable[[NeuronStatistics, Space, int], Allocation]", *, is_of_axes: bool = False
) -> Callable[[Given, int], tuple[Allocation, float]]:
    """How a method chooses that reads its allocation off the statistics.

    Args:
        is_of_axes: as in `Method`.
    """

    def choose(given: Given, budget: int) -> tuple[Allocation, float]:
        if given.statistics is None:
            raise LopError("the statistics are missing: run `lop calibrate` first")
        start = time.perf_counter()
        allocation = _allocated(allocate, given.statistics, given.space, budget, is_of_axes=is_of_axes)
        return allocation, time.perf_counter() - start

    return choose


def _allocated(
    allocate: "Callable[[NeuronStatistics, Space, int], Allocation]",
    statistics: "NeuronStatistics",
    space: Space,
    budget: int,
    *,
    is_of_axes: bool,
) -> Allocation:
    if is_of_axes:
        return allocate(statistics, space, budget)
    return of_ffns(space, budget, lambda ffns, neurons: allocate(statistics, ffns, neurons))


def look_up(given: Given, budget: int) -> tuple[Allocation, float]:
    """How a method chooses that has searched before.

    Raises:
        LopError: it has not searched for that budget.
    """
    if budget not in given.found:
        raise LopError(
            f"the search has no target {given.space.ratio(budget):.4g}: "
            "name those that it has in compare.targets and compare.recovery_targets"
        )
    return given.found[budget]
