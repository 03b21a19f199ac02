"""The paper's tables and figures on the embedded benchmark, with intervals and tests.

Methods are the rows, targets and benchmarks the columns. `lop.report.entries` says what is compared, `cells` scores it,
`board` compares the scores and `speed` the seconds; this file gathers them all for `lop.report.tables_report`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from lop.checkpoint.footprint import Footprint
from lop.errors import LopError
from lop.methods.lop_predictor import METHOD as LOP_PREDICTOR
from lop.methods.lop_search import METHOD as LOP_SEARCH
from lop.methods.method import Side
from lop.model.find import find_model
from lop.report.benchmark import Question, Verdict, fingerprint_benchmark, probes, respond
from lop.report.board import Board, Test, Value, details, pairwise_tests, values
from lop.report.cells import Spread, score_cells
from lop.report.entries import Entry, baseline_entries, cells, dense_entry, grouped, lop_entries, rival_entries
from lop.report.speed import Speed, speeds
from lop.run.outcomes import Outcome
from lop.run.results import read_search
from lop.run.run import Run
from lop.search.sensitivity import scan, scan_widths
from lop.space.allocation import Allocation
from lop.storage.files import read_as
from lop.storage.headers import read_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A model in table 2: its parameters and its metrics by column."""

    name: str
    parameters: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Tables:
    """Everything that `lop compare` makes of the benchmark."""

    fingerprints: Mapping[str, str]
    counts: Mapping[str, int]
    seeds: tuple[int, ...]
    values: tuple[Value, ...]
    details: tuple[Mapping[str, Any], ...]
    tests: tuple[Test, ...]
    seconds: tuple[Speed, ...]
    models: tuple[Model, ...]
    allocations: tuple[Mapping[str, Any], ...]
    curves: tuple[Outcome, ...]
    predictors: tuple[Mapping[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "seconds": [speed.as_dict() for speed in self.seconds]}


def make_tables(
    runs: Sequence[Run],
    questions: Mapping[str, Sequence[Question]],
    outcomes: Sequence[Outcome],
    written: Mapping[str, Sequence[str]],
    spread: Spread,
    *,
    progress: bool = True,
) -> Tables:
    """All tables' numbers.

    Args:
        runs: one for each seed, searched and trained.
        outcomes: what the methods that search by themselves have found.
        written: by name, what other models write to all questions, task after task.
        spread: what scores the cells, side by side.

    Raises:
        LopError: an earlier stage has not been run.
    """
    run = runs[0]
    targets = _targets(run)
    entries = [*baseline_entries(run, targets, progress=progress), *rival_entries(run, outcomes)]
    for seed_run in runs:
        entries += lop_entries(seed_run, targets)
    full = dense_entry(run)
    samples = probes(question for task in questions.values() for question in task)
    wanted = list(dict.fromkeys(cells([full, *entries])))
    scored = score_cells(run, wanted, samples, spread, progress=progress)
    verdicts = {
        cell: {task: respond(mine, samples, scored[cell].hits) for task, mine in questions.items()} for cell in wanted
    }
    board = Board(questions, verdicts, full.cell)
    return Tables(
        fingerprints={**run.evaluation_fingerprints, "benchmark": fingerprint_benchmark(questions)},
        counts={task: len(mine) for task, mine in questions.items()},
        seeds=tuple(seed_run.config.seed for seed_run in runs),
        values=tuple(values(board, [full, *entries])),
        details=tuple(details(verdicts, [full, *entries])),
        tests=tuple(pairwise_tests(board, entries)),
        seconds=tuple(speeds(run, entries, scored)),
        models=(*_own_models(run, board, full, entries), *_other_models(board, questions, written)),
        allocations=tuple(_allocations(run, entries)),
        curves=(*outcomes, *_tree_curves(runs, targets)),
        predictors=tuple(_predictors(runs)),
    )


def _targets(run: Run) -> tuple[float, ...]:
    """The tables' targets, as far as the search has them."""
    searched = {run.space.budget(found.target) for found in read_search(run)}
    wanted = run.config.tables.targets
    found = tuple(target for target in wanted if run.space.budget(target) in searched)
    if left := [f"{target:.4g}" for target in wanted if target not in found]:
        log.warning("tables: no search has targets %s: they are left out", ", ".join(left))
    if not found:
        raise LopError("tables.targets: none of them is one of the search's targets")
    return found


def _own_models(run: Run, board: Board, full: Entry, entries: Sequence[Entry]) -> Iterator[Model]:
    """The dense model, and what LOP's predictor makes of it at every target."""
    yield Model(full.method, run.size.parameters, board.metrics([full.cell]))
    for (method, target), group in grouped(entries).items():
        if method == LOP_PREDICTOR.name:
            parameters = Footprint(run.size, attention=run.space.attention).parameters(group[0].cell.widths)
            yield Model(f"LOP {target:.0%}", parameters, board.metrics(cells(group)))


def _other_models(
    board: Board, questions: Mapping[str, Sequence[Question]], written: Mapping[str, Sequence[str]]
) -> Iterator[Model]:
    for name, answers in written.items():
        texts = iter(answers)
        verdicts = {
            task: [Verdict(q.group, q.part, q.sample.answer, next(texts)) for q in mine]
            for task, mine in questions.items()
        }
        parameters = sum(tensor.parameters for tensor in read_tensors(find_model(name)).values())
        yield Model(name, parameters, board.of_verdicts(verdicts))


def _allocations(run: Run, entries: Sequence[Entry]) -> Iterator[Mapping[str, Any]]:
    for entry in entries:
        is_one = entry.seed == run.config.seed and entry.side is not Side.ARCHITECTURE
        if is_one and entry.cell.reshaped is None:
            ratios = Allocation(entry.cell.widths).ratios(run.space)
            yield {"method": entry.method, "target": entry.target, "ratios": list(ratios)}


def _tree_curves(runs: Sequence[Run], targets: Sequence[float]) -> Iterator[Outcome]:
    """The search's own curves, in the form of the rivals'; a race that was given up counts by the samples it took."""
    for run in runs:
        reward, samples = run.config.search.reward, len(run.samples.reward)
        wanted = {run.space.budget(target): target for target in targets}
        for found in read_search(run):
            if (target := wanted.get(run.space.budget(found.target))) is None:
                continue
            spent, best, curve = _scanned(run) + found.descended / samples, -np.inf, []
            for _, evaluation in found.evaluations:
                spent += 1.0 if evaluation.scored is None else evaluation.scored / samples
                if evaluation.is_complete and not evaluation.error:
                    best = max(best, evaluation.worth(reward))
                    curve.append((spent, best))
            yield Outcome(LOP_SEARCH.name, target, run.config.seed, found.best.widths, best, tuple(curve), 0.0)


def _scanned(run: Run) -> float:
    """One target's share of the scan that all trees start from, in evaluations."""
    settings = run.config.search
    if not settings.scans:
        return 0.0
    space, levels = run.space, settings.sensitivity_levels
    alone = [len(scan(space, scan_widths(space, levels, part), part)) for part in range(len(space.parts))]
    return sum(alone) / len(settings.targets.ratios)


def _predictors(runs: Sequence[Run]) -> Iterator[Mapping[str, Any]]:
    for run in runs:
        path = run.folder / "predictors.json"
        if path.exists():
            for record in read_as(path, itemgetter("architectures")):
                yield {"seed": run.config.seed, **record}
