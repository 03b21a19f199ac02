"""What the tables compare: every method at every target with every seed, and the cell that scores it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lop.methods.flap import TWINS
from lop.methods.lop_predictor import METHOD as LOP_PREDICTOR
from lop.methods.method import Given, Method, Need, Side
from lop.methods.registry import METHODS, RESHAPINGS, USUAL_BASELINES
from lop.methods.reshaping import Reshaping
from lop.report.cells import Cell
from lop.run.outcomes import Outcome
from lop.run.prediction import open_predictor
from lop.run.results import read_search
from lop.run.run import Run
from lop.run.surveys import statistics_for
from lop.space.allocation import Allocation, dense

# By budget, what a search has found, and its seconds.
Found = Mapping[int, tuple[Allocation, float]]


@dataclass(frozen=True)
class Entry:
    """A method at a target with one seed.

    Attributes:
        method: the name in the registry, `dense`, or `predictor` with an architecture (for table 3).
        needs: what the method needs.
        allocate_seconds: to choose the widths.
    """

    method: str
    side: Side
    target: float
    seed: int
    cell: Cell
    needs: frozenset[Need]
    allocate_seconds: float


def given(run: Run, method: Method, *, found: Found | None = None, progress: bool = True) -> Given:
    """What a method that chooses is given of a run.

    Args:
        found: by budget, what the method's own search has found, and its seconds.

    Raises:
        LopError: what it needs has not been made yet.
    """
    return Given(
        run.space,
        run.config.importance,
        statistics_for(run, method, progress=progress),
        _searched(run) if Need.SEARCH in method.needs else found or {},
        open_predictor(run, run.predictor_folder) if Need.PREDICTOR in method.needs else None,
    )


def dense_entry(run: Run) -> Entry:
    """The unpruned model."""
    cell = Cell(run.config.importance, dense(run.space).widths)
    return Entry("dense", Side.DENSE, 0.0, run.config.seed, cell, frozenset(), 0.0)


def baselines(run: Run) -> Sequence[str]:
    """The baselines that the config names, or the usual; of these none twice where all have one recovery."""
    if run.config.tables.baselines:
        return run.config.tables.baselines
    if run.config.scored_recovery == "none":
        return USUAL_BASELINES
    return [name for name in USUAL_BASELINES if name not in TWINS]


def baseline_entries(run: Run, targets: Sequence[float], *, progress: bool) -> Iterator[Entry]:
    """The `baselines`: what reads its allocation off the statistics, or reshapes."""
    for name in baselines(run):
        if name in RESHAPINGS:
            yield from _reshaped_entries(run, RESHAPINGS[name], targets)
            continue
        yield from _entries(METHODS[name], given(run, METHODS[name], progress=progress), targets, run.config.seed)


def _reshaped_entries(run: Run, method: Reshaping, targets: Sequence[float]) -> Iterator[Entry]:
    """A method that leaves the FFNs as they are, at as many parameters."""
    for target in targets:
        removed = run.removed_parameters(target)
        cell = Cell(run.config.importance, dense(run.space).widths, reshaped=(method.name, removed))
        yield Entry(method.name, method.side, target, run.config.seed, cell, method.needs, 0.0)


def rival_entries(run: Run, outcomes: Sequence[Outcome]) -> Iterator[Entry]:
    """The methods that search by themselves, at the targets that they have."""
    by_job: dict[tuple[str, int], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_job[outcome.rival, outcome.seed].append(outcome)
    for (name, seed), mine in by_job.items():
        method = METHODS[name]
        found = found_by(run, mine)
        if method.is_compared:
            yield from _entries(method, given(run, method, found=found), [outcome.target for outcome in mine], seed)


def found_by(run: Run, outcomes: Sequence[Outcome]) -> Found:
    """What one rival's outcomes say."""
    search = METHODS[outcomes[0].rival].search
    # One search may serve all targets.
    shared = len(outcomes) if search is not None and search.is_shared else 1
    return {run.space.budget(each.target): (Allocation(each.widths), each.seconds / shared) for each in outcomes}


def lop_entries(run: Run, targets: Sequence[float]) -> Iterator[Entry]:
    """LOP's own methods, and each architecture that was trained, as a method by itself."""
    for method in METHODS.values():
        if method.side is Side.LOP and method.is_compared:
            yield from _entries(method, given(run, method), targets, run.config.seed)
    for architecture in run.config.train.architectures:
        if (folder := run.predictors_folder / architecture).exists():
            known = Given(run.space, run.config.importance, predictor=open_predictor(run, folder))
            named = f"predictor {architecture}"
            yield from _entries(LOP_PREDICTOR, known, targets, run.config.seed, name=named, side=Side.ARCHITECTURE)


def grouped(entries: Iterable[Entry]) -> dict[tuple[str, float], list[Entry]]:
    """The seeds of each method and target together."""
    groups: dict[tuple[str, float], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.method, entry.target].append(entry)
    return groups


def cells(group: Iterable[Entry]) -> list[Cell]:
    """The entries' cells."""
    return [entry.cell for entry in group]


def _entries(
    method: Method,
    known: Given,
    targets: Sequence[float],
    seed: int,
    *,
    name: str | None = None,
    side: Side | None = None,
) -> Iterator[Entry]:
    for target in targets:
        choice = method(known, known.space.budget(target))
        cell = Cell(choice.importance, choice.allocation.widths, choice.bias)
        yield Entry(name or method.name, side or method.side, target, seed, cell, method.needs, choice.seconds)


def _searched(run: Run) -> dict[int, tuple[Allocation, float]]:
    """What the run's search found by budget, with one target's share of the search's time."""
    found = read_search(run)
    seconds = run.seconds().get("search", 0.0) / len(found)
    return {run.space.budget(result.target): (result.best, seconds) for result in found}
