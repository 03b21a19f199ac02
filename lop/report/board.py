"""The numbers of the tables: each method's share of each column, and whom it is significantly ahead of."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lop.methods.method import Side
from lop.report.benchmark import COLUMNS, METRICS, Question, Verdict, units
from lop.report.cells import Cell
from lop.report.entries import Entry, cells, grouped
from lop.report.intervals import Interval, Resampler, bootstrap_p, mcnemar, mean_over_forms, percentile_interval

SIGNIFICANT = 0.05
AVERAGE = "average"
# Of a cell, its verdicts on each task's questions.
Verdicts = Mapping[str, Sequence[Verdict]]


@dataclass(frozen=True)
class Value:
    """One number of a table: a method at a target in a column, over all seeds.

    Attributes:
        column: one of `COLUMNS` or `average`.
        share: of the column's maximum, with the 95% interval of a bootstrap over images.
        metric: in the benchmark's own unit (MME: points; others: percent).
        drop: what is lost against the dense model, in that unit.
        seeds: each seed's share.
        rival: the best method of the other side, LOP against baselines, at the same target and column.
        lead: the share's difference to the rival, paired over images.
        p: the two-sided p-value of the lead.
        bold: whether the lead is above zero and significant.
    """

    method: str
    side: Side
    target: float
    column: str
    share: Interval
    metric: float
    drop: float
    seeds: tuple[float, ...]
    rival: str
    lead: Interval
    p: float
    bold: bool


@dataclass(frozen=True)
class Test:
    """A method of LOP's against a baseline at a target, over all columns.

    Attributes:
        difference: of the averages, with the paired bootstrap's interval.
        bootstrap_p: the paired bootstrap's two-sided p-value.
        mcnemar_p: McNemar's exact one on all questions of the first seed, each question alone.
    """

    method: str
    baseline: str
    target: float
    difference: Interval
    bootstrap_p: float
    mcnemar_p: float


class Board:
    """Shares of columns and their resampled selves, for any cell, averaged over a method's seeds."""

    def __init__(
        self, questions: Mapping[str, Sequence[Question]], verdicts: Mapping[Cell, Verdicts], full: Cell
    ) -> None:
        self._questions = questions
        self._verdicts = verdicts
        self._single = [column for column in COLUMNS if column.partition("_")[0] in questions]
        self.columns = (*self._single, AVERAGE)
        images = dict.fromkeys(q.sample.image_key for mine in questions.values() for q in mine)
        self._resampler = Resampler(list(images))
        self._known: dict[tuple[Cell, str], tuple[float, np.ndarray]] = {}
        self.dense = {column: self.share([full], column)[0] for column in self.columns}

    def share(self, cells: Sequence[Cell], column: str) -> tuple[float, np.ndarray]:
        """A column's share of its maximum and its resampled selves, the mean over the cells."""
        if column == AVERAGE:
            parts = [self.share(cells, name) for name in self._single]
        else:
            parts = [self._of_cell(cell, column) for cell in cells]
        return float(np.mean([value for value, _ in parts])), np.mean([resampled for _, resampled in parts], axis=0)

    def metric(self, share: float, column: str) -> float:
        """A share in the benchmark's own unit."""
        if not column.startswith("mme_"):
            return 100 * share
        half = column.partition("_")[2]
        categories = {q.part for q in self._questions["mme"] if q.part.startswith(half)}
        return 200 * len(categories) * share

    def metrics(self, cells: Sequence[Cell]) -> dict[str, float]:
        """The metrics by column, with their average."""
        return {column: self.metric(self.share(cells, column)[0], column) for column in self.columns}

    def right(self, cell: Cell) -> np.ndarray:
        """[n] bool, which questions of all tasks a cell answers right."""
        return np.array([verdict.is_right for mine in self._verdicts[cell].values() for verdict in mine])

    def of_verdicts(self, verdicts: Verdicts) -> dict[str, float]:
        """The metrics by column of what no cell is, with their average in percent."""
        shares = {column: mean_over_forms(*self._units(column, verdicts)[:2]) for column in self._single}
        metrics = {column: self.metric(share, column) for column, share in shares.items()}
        return {**metrics, AVERAGE: 100 * statistics.fmean(shares.values())}

    def _of_cell(self, cell: Cell, column: str) -> tuple[float, np.ndarray]:
        if (cell, column) not in self._known:
            values, strata, images = self._units(column, self._verdicts[cell])
            self._known[cell, column] = mean_over_forms(values, strata), self._resampler.means(values, strata, images)
        return self._known[cell, column]

    def _units(self, column: str, verdicts: Verdicts) -> tuple[Any, Any, Any]:
        task = column.partition("_")[0]
        found = units(column, self._questions[task], verdicts[task])
        return found.values, found.strata, found.images


def values(board: Board, entries: Sequence[Entry]) -> Iterator[Value]:
    """Every method at every target in every column, against the best of the other side."""
    groups = grouped(entries)
    for (method, target), group in groups.items():
        side = group[0].side
        found = {
            name: cells(other)
            for (name, at), other in groups.items()
            if at == target and other[0].side in side.opponents
        }
        rivals = found or {method: cells(group)}
        for column in board.columns:
            share, resampled = board.share(cells(group), column)
            best = max(rivals, key=lambda name: board.share(rivals[name], column)[0])
            other, other_resampled = board.share(rivals[best], column)
            p = bootstrap_p(resampled - other_resampled)
            yield Value(
                method,
                side,
                target,
                column,
                percentile_interval(share, resampled),
                board.metric(share, column),
                board.metric(board.dense[column] - share, column),
                tuple(board.share([cell], column)[0] for cell in cells(group)),
                best,
                percentile_interval(share - other, resampled - other_resampled),
                p,
                share > other and p < SIGNIFICANT,
            )


def pairwise_tests(board: Board, entries: Sequence[Entry]) -> Iterator[Test]:
    """LOP's methods against each other method at each target."""
    groups = grouped(entries)
    for (method, target), group in groups.items():
        if group[0].side is not Side.LOP:
            continue
        share, resampled = board.share(cells(group), AVERAGE)
        for (name, at), other in groups.items():
            if at == target and other[0].side in Side.LOP.opponents:
                theirs, their_resampled = board.share(cells(other), AVERAGE)
                difference = resampled - their_resampled
                exact = mcnemar(board.right(group[0].cell), board.right(other[0].cell))
                interval = percentile_interval(share - theirs, difference)
                yield Test(method, name, target, interval, bootstrap_p(difference), exact)


def details(verdicts: Mapping[Cell, Verdicts], entries: Sequence[Entry]) -> Iterator[Mapping[str, Any]]:
    """All of the benchmarks' own metrics: F1 and yes-rate, subjects, categories."""
    for entry in entries:
        metrics = {task: METRICS[task](mine) for task, mine in verdicts[entry.cell].items()}
        yield {"method": entry.method, "target": entry.target, "seed": entry.seed, "metrics": metrics}
