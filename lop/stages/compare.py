"""`lop compare`: LOP against the other methods, as a report and as the paper's tables."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path

from lop.errors import LopError
from lop.methods.registry import METHODS
from lop.model.adapter import load_model
from lop.model.find import find_model, find_samples
from lop.model.generation import answers
from lop.model.samples import Sample
from lop.report.benchmark import check_disjoint, limit, load_benchmark
from lop.report.compare import Comparison, asked, compare, compared_methods, comparison_fingerprints
from lop.report.entries import Found, baselines, found_by
from lop.report.operations import compared_ways, score_ways
from lop.report.report import write_report
from lop.report.tables import make_tables
from lop.report.tables_report import report_tables
from lop.run.compute import Compute, on_worker
from lop.run.results import read_search
from lop.run.run import Run
from lop.run.surveys import SURVEYS
from lop.stages.rivals import rivals_stage
from lop.stages.search import search_stage
from lop.stages.surveys import survey_stage
from lop.stages.train import train_stage
from lop.storage.files import read_as, write_json

log = logging.getLogger(__name__)


def compare_stage(run: Run, compute: Compute) -> Path:
    """Compares on the test samples, unless that is there already, and writes `results.json` and the report.

    Raises:
        LopError: an earlier stage has not been run.
    """
    _check_trained(run)
    run.check_writable()
    results = run.folder / "results.json"
    fingerprints = comparison_fingerprints(run)
    if results.exists() and read_as(results, itemgetter("fingerprints")) == fingerprints:
        comparison = read_as(results, Comparison.from_dict)
    else:
        found = _found(run, compute)
        comparison = on_worker(partial(compare, found=found), run, compute)
        write_json(results, comparison.as_dict())
    spread = partial(compute.map, config=run.config)
    return write_report(run, comparison, score_ways(run, compared_ways(run), asked(run), spread))


def tables_stage(run: Run, compute: Compute, *, others: Sequence[str] = (), progress: bool = True) -> Path | None:
    """Scores every method at every target on the benchmark and writes `tables.md`, `tables.json` and their pictures.

    Args:
        others: models for table 2: local checkpoints or hub ids of a family that LOP takes.

    Returns:
        The Markdown file's path; None where the samples have no benchmark.

    Raises:
        LopError: an earlier stage has not been run, or the benchmark shares an image with calibration or reward.
    """
    questions = limit(load_benchmark(find_samples(run.config.samples)), run.config.tables.limit)
    if not questions:
        log.info("tables: samples %s have no benchmark folder", run.config.samples)
        return None
    check_disjoint(questions, run.samples)
    run.check_writable()
    survey_stage(run, compute, [name for name in baselines(run) if name in METHODS], progress=progress)
    runs = list(_seed_runs(run, compute, progress=progress))
    outcomes = rivals_stage(run, compute, seeds=len(runs), progress=progress)
    asked = [question.sample for mine in questions.values() for question in mine]
    written = {name: on_worker(partial(_answers, name, asked, progress), run, compute) for name in others}
    spread = partial(compute.map, config=run.config)
    return report_tables(run, make_tables(runs, questions, outcomes, written, spread, progress=progress))


def _found(run: Run, compute: Compute) -> dict[str, Found]:
    """What those of the compared methods that search by themselves find; makes what the others read."""
    methods, settings = [name for name in compared_methods(run) if name in METHODS], run.config.compare
    survey_stage(run, compute, methods)
    searching = [name for name in methods if METHODS[name].search]
    targets = tuple(dict.fromkeys((*settings.targets, *(settings.recovery_targets if settings.recoveries else ()))))
    outcomes = rivals_stage(run, compute, rivals=searching, targets=targets) if searching else []
    return {name: found_by(run, [each for each in outcomes if each.rival == name]) for name in searching}


def _check_trained(run: Run) -> None:
    read_search(run)
    if not run.predictor_folder.exists():
        raise LopError(f"{run.predictor_folder} is missing: run `lop train` first")


def _seed_runs(run: Run, compute: Compute, *, progress: bool) -> Iterator[Run]:
    """The run itself, and one with its own search and predictors for each further seed."""
    _check_trained(run)
    yield run
    for extra in range(1, run.config.tables.seeds):
        other = run.with_seed(run.config.seed + extra)
        other.folder.mkdir(parents=True, exist_ok=True)
        # Neither depends on the seed.
        for mine in (run.statistics_file, run.spectra_file, *map(run.survey_file, SURVEYS)):
            theirs = other.folder / mine.name
            if mine.exists() and not theirs.exists():
                shutil.copyfile(mine, theirs)
        search_stage(other, compute, progress=progress)
        train_stage(other, compute, progress=progress)
        yield other


def _answers(name: str, asked: Sequence[Sample], progress: bool, run: Run) -> list[str]:
    model = load_model(find_model(name), device=run.config.device, dtype=run.config.dtype)
    return answers(model, asked, progress=progress)
