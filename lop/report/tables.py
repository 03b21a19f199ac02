"""The paper's tables and figures on the embedded benchmark, with intervals and tests.

Methods are the rows, targets and benchmarks the columns. Every number comes from `lop.report.cells`; this file gathers
them, compares them, and hands them to `lop.report.tables_report`.
"""

import logging
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from lop.errors import LopError
from lop.methods.baselines import ALL_BASELINES, Baseline
from lop.methods.rivals import Outcome, rivals_stage
from lop.model.adapter import load_model
from lop.model.find import find_model, find_samples
from lop.model.generation import answers
from lop.model.importance import IMPORTANCES
from lop.model.samples import Sample
from lop.report.benchmark import (
    COLUMNS,
    METRICS,
    Question,
    Verdict,
    check_disjoint,
    fingerprint_benchmark,
    limit,
    load_benchmark,
    probes,
    respond,
    units,
)
from lop.report.cells import Cell, Scored, score_cells
from lop.report.intervals import Interval, Resampler, bootstrap_p, mcnemar, mean_over_forms, percentile_interval
from lop.run.compute import Compute, on_worker
from lop.run.prediction import open_predictor
from lop.run.results import read_search
from lop.run.run import Run
from lop.run.spectra import layer_spectra, statistics_for
from lop.search.sensitivity import scan, scan_widths
from lop.space.allocation import Allocation, dense
from lop.stages.search import search_stage
from lop.stages.train import train_stage
from lop.storage.files import read_as
from lop.storage.headers import read_tensors

log = logging.getLogger(__name__)
LOP = ("lop-search", "lop-predictor")
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Entry:
    """A method at a target with one seed.

    Attributes:
        family: `dense`, `baseline`, `rival`, `lop` or `architecture` (a predictor, for table 3).
        calibrates: whether the method needs statistics of activations.
        allocate_seconds: to choose the widths.
    """

    method: str
    family: str
    target: float
    seed: int
    cell: Cell
    calibrates: bool
    allocate_seconds: float


@dataclass(frozen=True)
class Value:
    """One number of a table: a method at a target in a column, over all seeds.

    Attributes:
        column: one of `COLUMNS` or `average`.
        share: of the column's maximum, with the 95% interval of a bootstrap over images.
        metric: in the benchmark's own unit (MME: points; others: percent).
        drop: what is lost against the dense model, in that unit.
        seeds: each seed's share.
        rival: the best method of the other family, LOP against baselines, at the same target and column.
        lead: the share's difference to the rival, paired over images.
        p: the two-sided p-value of the lead.
        bold: whether the lead is above zero and significant.
    """

    method: str
    family: str
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


@dataclass(frozen=True)
class Seconds:
    """What a method takes, medians over targets and seeds.

    Attributes:
        calibrate: to collect the statistics, and to measure the spectra for the method that reads them; zero for a
            method that needs neither.
        allocate: to choose the widths of one target.
        sort: to rank and permute the neurons by the method's scores.
        prune: to take the widths, and to compute the bias.
        speedup_paper: FLAP's calibrate + allocate + sort + prune over what LOP spends once its predictor is trained,
            allocate + prune; baselines by all four.
        speedup_cached: allocate + prune for everyone: statistics and order are kept for all.
    """

    method: str
    calibrate: float
    allocate: float
    sort: float
    prune: float
    speedup_paper: float
    speedup_cached: float


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
    seconds: tuple[Seconds, ...]
    models: tuple[Model, ...]
    allocations: tuple[Mapping[str, Any], ...]
    curves: tuple[Outcome, ...]
    predictors: tuple[Mapping[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def check_tables(run: Run, *, others: Sequence[str] = ()) -> None:
    """Looks at what `write_tables` is asked for, before anything is done for nothing.

    Raises:
        LopError: there is no such baseline, or no such model.
    """
    _baseline_names(run)
    for name in others:
        find_model(name)


def write_tables(run: Run, compute: Compute, *, others: Sequence[str] = (), progress: bool = True) -> Path | None:
    """Scores every method at every target and writes `tables.md`, `tables.json` and their pictures.

    Args:
        others: models for table 2: local checkpoints or hub ids of the Qwen2.5-VL family.

    Returns:
        The Markdown file's path; None where the samples have no benchmark.

    Raises:
        LopError: an earlier stage has not been run, or the benchmark shares an image with calibration or reward.
    """
    from lop.report.tables_report import report_tables

    questions = limit(load_benchmark(find_samples(run.config.samples)), run.config.tables.limit)
    if not questions:
        log.info("tables: samples %s have no benchmark folder", run.config.samples)
        return None
    check_disjoint(questions, run.samples)
    run.check_writable()
    return report_tables(run, make_tables(run, compute, questions, others=others, progress=progress))


def make_tables(
    run: Run,
    compute: Compute,
    questions: Mapping[str, Sequence[Question]],
    *,
    others: Sequence[str] = (),
    progress: bool = True,
) -> Tables:
    """All tables' numbers.

    Raises:
        LopError: an earlier stage has not been run.
    """
    runs = list(_seed_runs(run, compute, progress=progress))
    targets = _targets(run)
    outcomes = rivals_stage(run, compute, seeds=len(runs), progress=progress)
    entries = [*_baseline_entries(run, targets, progress=progress), *_rival_entries(run, outcomes)]
    for seed_run in runs:
        entries += _lop_entries(seed_run, targets)
    full = Entry(
        "dense", "dense", 0.0, run.config.seed, Cell(run.config.importance, dense(run.space).widths), False, 0.0
    )
    samples = probes(question for task in questions.values() for question in task)
    cells = list(dict.fromkeys(entry.cell for entry in [full, *entries]))
    scored = score_cells(run, compute, cells, samples, progress=progress)
    verdicts = {
        cell: {task: respond(mine, samples, scored[cell].hits) for task, mine in questions.items()} for cell in cells
    }
    board = _Board(questions, verdicts, full.cell)
    return Tables(
        fingerprints={**run.evaluation_fingerprints, "benchmark": fingerprint_benchmark(questions)},
        counts={task: len(mine) for task, mine in questions.items()},
        seeds=tuple(seed_run.config.seed for seed_run in runs),
        values=tuple(_values(board, [full, *entries])),
        details=tuple(_details(verdicts, [full, *entries])),
        tests=tuple(_tests(board, entries)),
        seconds=tuple(_seconds(run, entries, scored)),
        models=tuple(_models(run, compute, board, entries, others, questions, progress=progress)),
        allocations=tuple(_allocations(run, entries)),
        curves=(*outcomes, *_tree_curves(runs, targets)),
        predictors=tuple(_predictors(runs)),
    )


class _Board:
    """Shares of columns and their resampled selves, for any cell, averaged over a method's seeds."""

    def __init__(
        self,
        questions: Mapping[str, Sequence[Question]],
        verdicts: Mapping[Cell, Mapping[str, Sequence[Verdict]]],
        full: Cell,
    ) -> None:
        self._questions = questions
        self._verdicts = verdicts
        self.columns = [column for column in COLUMNS if column.partition("_")[0] in questions]
        images = dict.fromkeys(q.sample.image_key for mine in questions.values() for q in mine)
        self._resampler = Resampler(list(images))
        self._known: dict[tuple[Cell, str], tuple[float, np.ndarray]] = {}
        self.dense = {column: self.share([full], column)[0] for column in (*self.columns, "average")}

    def share(self, cells: Sequence[Cell], column: str) -> tuple[float, np.ndarray]:
        """A column's share of its maximum and its resampled selves, the mean over the cells."""
        if column == "average":
            parts = [self.share(cells, name) for name in self.columns]
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

    def right(self, cell: Cell) -> np.ndarray:
        """[n] bool, which questions of all tasks a cell answers right."""
        return np.array([verdict.is_right for mine in self._verdicts[cell].values() for verdict in mine])

    def of_verdicts(self, verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, float]:
        """The metrics by column, with their average in percent."""
        shares = {column: _share(column, self._questions, verdicts) for column in self.columns}
        metrics = {column: self.metric(share, column) for column, share in shares.items()}
        return {**metrics, "average": 100 * statistics.fmean(shares.values())}

    def _of_cell(self, cell: Cell, column: str) -> tuple[float, np.ndarray]:
        if (cell, column) not in self._known:
            task = column.partition("_")[0]
            found = units(column, self._questions[task], self._verdicts[cell][task])
            resampled = self._resampler.means(found.values, found.strata, found.images)
            self._known[cell, column] = (mean_over_forms(found.values, found.strata), resampled)
        return self._known[cell, column]


def _share(
    column: str, questions: Mapping[str, Sequence[Question]], verdicts: Mapping[str, Sequence[Verdict]]
) -> float:
    task = column.partition("_")[0]
    found = units(column, questions[task], verdicts[task])
    return mean_over_forms(found.values, found.strata)


def _seed_runs(run: Run, compute: Compute, *, progress: bool) -> Iterator[Run]:
    """The run itself, and one with its own search and predictors for each further seed."""
    read_search(run)
    if not run.predictor_folder.exists():
        raise LopError(f"{run.predictor_folder} is missing: run `lop train` first")
    yield run
    for extra in range(1, run.config.tables.seeds):
        other = run.with_seed(run.config.seed + extra)
        other.folder.mkdir(parents=True, exist_ok=True)
        # Neither depends on the seed.
        for mine, theirs in ((run.statistics_file, other.statistics_file), (run.spectra_file, other.spectra_file)):
            if mine.exists() and not theirs.exists():
                shutil.copyfile(mine, theirs)
        search_stage(other, compute, progress=progress)
        train_stage(other, compute, progress=progress)
        yield other


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


def _baseline_entries(run: Run, targets: Sequence[float], *, progress: bool) -> Iterator[Entry]:
    for name in _baseline_names(run):
        baseline = ALL_BASELINES[name]
        evidence = statistics_for(run, baseline, progress=progress)
        for target in targets:
            start = time.perf_counter()
            allocation = baseline.allocate(evidence, run.space, run.space.budget(target))
            spent = time.perf_counter() - start
            cell = Cell(_importance_name(run, name, baseline), allocation.widths, baseline.bias)
            yield Entry(name, "baseline", target, run.config.seed, cell, name != "magnitude", spent)


def _baseline_names(run: Run) -> tuple[str, ...]:
    names = run.config.tables.baselines
    if names is None:
        return tuple(ALL_BASELINES)
    for name in names:
        if name not in ALL_BASELINES:
            raise LopError(f"tables.baselines: {name!r} is not one of {', '.join(ALL_BASELINES)}")
    return names


def _importance_name(run: Run, name: str, baseline: Baseline) -> str:
    if name in ("uniform", "owl", "alphapruning"):
        return run.config.importance  # LOP's own, with another allocation.
    return next(key for key, score in IMPORTANCES.items() if score is baseline.score)


def _rival_entries(run: Run, outcomes: Sequence[Outcome]) -> Iterator[Entry]:
    targets = len(run.config.tables.targets)
    for outcome in outcomes:
        if outcome.rival == "mcts-noroots":
            continue  # LOP itself, less its roots: in the curves, but no baseline.
        cell = Cell(run.config.importance, outcome.widths)
        # One scan of sensitivities serves all targets.
        spent = outcome.seconds / (targets if outcome.rival == "sensitivity" else 1)
        yield Entry(outcome.rival, "rival", outcome.target, outcome.seed, cell, True, spent)


def _lop_entries(run: Run, targets: Sequence[float]) -> Iterator[Entry]:
    found = {run.space.budget(result.target): result.best for result in read_search(run)}
    search_seconds = run.seconds().get("search", 0.0) / len(found)
    predictors = {"lop-predictor": run.predictor_folder}
    for architecture in run.config.train.architectures:
        if (folder := run.predictors_folder / architecture).exists():
            predictors[f"predictor {architecture}"] = folder
    loaded = {name: open_predictor(run, folder) for name, folder in predictors.items()}
    for target in targets:
        budget = run.space.budget(target)
        cell = Cell(run.config.importance, found[budget].widths)
        yield Entry("lop-search", "lop", target, run.config.seed, cell, True, search_seconds)
        for name, predictor in loaded.items():
            predictor.allocate(budget)  # The first call pays for set-up that later ones do not.
            start = time.perf_counter()
            widths = predictor.allocate(budget).widths
            spent = time.perf_counter() - start
            family = "lop" if name == "lop-predictor" else "architecture"
            yield Entry(name, family, target, run.config.seed, Cell(run.config.importance, widths), True, spent)


def _grouped(entries: Sequence[Entry]) -> dict[tuple[str, float], list[Entry]]:
    groups: dict[tuple[str, float], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.method, entry.target].append(entry)
    return groups


def _cells(group: Sequence[Entry]) -> list[Cell]:
    return [entry.cell for entry in group]


def _values(board: _Board, entries: Sequence[Entry]) -> Iterator[Value]:
    groups = _grouped(entries)
    for (method, target), group in groups.items():
        family = group[0].family
        # LOP's methods are compared with all others, and the others with LOP's.
        wanted = {"lop": ("baseline", "rival"), "architecture": ("baseline", "rival"), "dense": ()}.get(
            family, ("lop",)
        )
        found = {
            name: _cells(other) for (name, at), other in groups.items() if at == target and other[0].family in wanted
        }
        rivals = found or {method: _cells(group)}
        for column in (*board.columns, "average"):
            share, resampled = board.share(_cells(group), column)
            best = max(rivals, key=lambda name: board.share(rivals[name], column)[0])
            other, other_resampled = board.share(rivals[best], column)
            p = bootstrap_p(resampled - other_resampled)
            yield Value(
                method,
                family,
                target,
                column,
                percentile_interval(share, resampled),
                board.metric(share, column),
                board.metric(board.dense[column] - share, column),
                tuple(board.share([cell], column)[0] for cell in _cells(group)),
                best,
                percentile_interval(share - other, resampled - other_resampled),
                p,
                share > other and p < SIGNIFICANT,
            )


def _details(
    verdicts: Mapping[Cell, Mapping[str, Sequence[Verdict]]], entries: Sequence[Entry]
) -> Iterator[Mapping[str, Any]]:
    """All of the benchmarks' own metrics: F1 and yes-rate, subjects, categories."""
    for entry in entries:
        metrics = {task: METRICS[task](mine) for task, mine in verdicts[entry.cell].items()}
        yield {"method": entry.method, "target": entry.target, "seed": entry.seed, "metrics": metrics}


def _tests(board: _Board, entries: Sequence[Entry]) -> Iterator[Test]:
    groups = _grouped(entries)
    for (method, target), group in groups.items():
        if group[0].family != "lop":
            continue
        share, resampled = board.share(_cells(group), "average")
        for (name, at), other in groups.items():
            if at == target and other[0].family in ("baseline", "rival"):
                theirs, their_resampled = board.share(_cells(other), "average")
                difference = resampled - their_resampled
                exact = mcnemar(board.right(group[0].cell), board.right(other[0].cell))
                interval = percentile_interval(share - theirs, difference)
                yield Test(method, name, target, interval, bootstrap_p(difference), exact)


def _seconds(run: Run, entries: Sequence[Entry], scored: Mapping[Cell, Scored]) -> Iterator[Seconds]:
    results = run.folder / "results.json"
    measured = read_as(results, _calibrate_seconds) if results.exists() else []
    calibrate = max(measured, default=run.seconds().get("calibrate", 0.0))
    by_method: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.family != "architecture":
            by_method[entry.method].append(entry)

    def parts(method: str) -> tuple[float, float, float, float]:
        mine = by_method[method]
        by_spectra = method in ALL_BASELINES and ALL_BASELINES[method].by_spectra
        return (
            (calibrate if mine[0].calibrates else 0.0) + (layer_spectra(run).seconds if by_spectra else 0.0),
            statistics.median(entry.allocate_seconds for entry in mine),
            statistics.median(scored[entry.cell].sort_seconds for entry in mine),
            statistics.median(scored[entry.cell].prune_seconds for entry in mine),
        )

    reference = parts("flap") if "flap" in by_method else None
    for method in by_method:
        first, allocate, sort, prune = parts(method)
        cached = allocate + prune
        # As the paper counts: LOP's statistics and order are there when a target is asked for, a baseline's are not.
        spent = cached if method in LOP else first + allocate + sort + prune
        whole = sum(reference) / spent if reference else float("nan")
        kept = (reference[1] + reference[3]) / cached if reference else float("nan")
        yield Seconds(method, first, allocate, sort, prune, whole, kept)


def _calibrate_seconds(results: Any) -> list[float]:
    return [float(entry["calibrate"]) for entry in results["seconds"]]


def _models(
    run: Run,
    compute: Compute,
    board: _Board,
    entries: Sequence[Entry],
    others: Sequence[str],
    questions: Mapping[str, Sequence[Question]],
    *,
    progress: bool,
) -> Iterator[Model]:
    """LOP's predictor at every target, and the other models, by what they write."""
    dense_metrics = {column: board.metric(share, column) for column, share in board.dense.items()}
    yield Model("dense", run.size.parameters, dense_metrics)
    for (method, target), group in _grouped(entries).items():
        if method == "lop-predictor":
            metrics = {c: board.metric(board.share(_cells(group), c)[0], c) for c in (*board.columns, "average")}
            yield Model(f"LOP {target:.0%}", run.size.pruned_parameters(sum(group[0].cell.widths)), metrics)
    for name in others:
        folder = find_model(name)
        asked: list[Sample] = [question.sample for mine in questions.values() for question in mine]
        texts = iter(on_worker(partial(_answers, name, asked, progress), run, compute))
        verdicts = {
            task: [Verdict(q.group, q.part, q.sample.answer, next(texts)) for q in mine]
            for task, mine in questions.items()
        }
        parameters = sum(tensor.parameters for tensor in read_tensors(folder).values())
        yield Model(name, parameters, board.of_verdicts(verdicts))


def _answers(name: str, asked: Sequence[Sample], progress: bool, run: Run) -> list[str]:
    model = load_model(find_model(name), device=run.config.device, dtype=run.config.dtype)
    return answers(model, asked, progress=progress)


def _allocations(run: Run, entries: Sequence[Entry]) -> Iterator[Mapping[str, Any]]:
    for entry in entries:
        if entry.seed == run.config.seed and entry.family != "architecture":
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
            spent, best, curve = _scanned(run), -np.inf, []
            for _, evaluation in found.evaluations:
                spent += 1.0 if evaluation.scored is None else evaluation.scored / samples
                if evaluation.is_complete and not evaluation.error:
                    best = max(best, evaluation.worth(reward))
                    curve.append((spent, best))
            yield Outcome("mcts", target, run.config.seed, found.best.widths, best, tuple(curve), 0.0)


def _scanned(run: Run) -> float:
    """One target's share of the scan that all trees start from, in evaluations."""
    settings = run.config.search
    if "sensitivity" not in settings.roots:
        return 0.0
    return len(scan(run.space, scan_widths(run.space, settings.sensitivity_levels))) / len(settings.targets.ratios)


def _predictors(runs: Sequence[Run]) -> Iterator[Mapping[str, Any]]:
    for run in runs:
        path = run.folder / "predictors.json"
        if path.exists():
            for record in read_as(path, itemgetter("architectures")):
                yield {"seed": run.config.seed, **record}
