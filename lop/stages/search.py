"""From statistics and reward samples to the best allocation of every target."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lop.errors import LopError
from lop.methods.method import Root
from lop.methods.registry import METHODS
from lop.methods.uniform import METHOD as UNIFORM
from lop.model.samples import check_answers
from lop.run.building import few_samples
from lop.run.compute import Compute
from lop.run.config import save_config
from lop.run.prediction import general_identity, unsearched
from lop.run.run import Run
from lop.run.surveys import statistics_for
from lop.search.blending import blend
from lop.search.confirmation import Confirmed, confirm
from lop.search.descent import Few, RecordedDamages, descend, most_evaluations
from lop.search.ledger import Ledger
from lop.search.loop import Workers, run_search
from lop.search.progress import SearchProgress, Sink, bar_sink, log_sink, status_sink
from lop.search.sensitivity import best_additive, measure_damages
from lop.search.tree import SearchTree
from lop.space.allocation import Allocation, dense, project
from lop.stages.rivals import rival_root
from lop.stages.timing import timed
from lop.storage.files import read_as, write_json
from lop.storage.fingerprint import check_fingerprints, fingerprint

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_BARS = 0.2
_SECONDS_BETWEEN_STATUS = 2.0
_SECONDS_BETWEEN_LINES = 10.0


def search_stage(run: Run, compute: Compute, *, progress: bool = True) -> None:
    """Runs the search to its end, or takes it up where it was interrupted, and writes `search.json`."""
    starts = started(run)
    fingerprints = {**run.evaluation_fingerprints, "search settings": _search_fingerprint(run, starts)}
    if any(METHODS[name].root is Root.PREDICTED for name in run.config.search.roots):
        fingerprints["general predictor"] = general_identity(run)
    if run.search_file.exists() and read_as(run.search_file, itemgetter("fingerprints")) == fingerprints:
        log.info("search: %s is there already", run.search_file)
        return
    if run.config.search.needs_answers:
        check_answers(run.samples.reward, "the search's reward counts right answers in the reward samples")
    run.check_writable()
    trees = build_trees(run, starts)
    with timed(run, "search"), Ledger(run.ledger, run.ledger_fingerprints) as ledger:
        save_config(run.settled, run.folder / "config.yaml")
        with compute.evaluators(run) as workers, _watched(run, trees, compute.sinks(), shown=progress) as watcher:
            if run.config.search.scans:
                levels = run.config.search.sensitivity_levels
                damages = measure_damages(run.space, levels, workers, ledger, watcher=watcher)
                for tree in trees.values():
                    tree.add_start(best_additive(run.space, damages, tree.budget))
            descents = _descend(run, trees, workers, ledger, watcher)
            run_search(trees.values(), workers, ledger, watcher=watcher)
            blend(list(trees.values()), run.config.search.blended, workers, ledger, watcher)
            settings = run.config.search.confirm
            confirmed = (
                confirm(trees, settings.candidates, workers, ledger, watcher.tick, guards=starts) if settings else {}
            )
            watcher.finish(workers)
    write_json(
        run.search_file,
        {
            "fingerprints": fingerprints,
            "reward": run.config.search.reward,
            "targets": [
                _target_record(run, target, tree, confirmed.get(target, {})) | descents.get(target, {})
                for target, tree in trees.items()
            ],
        },
    )


def _descend(
    run: Run, trees: Mapping[float, SearchTree], workers: Workers, ledger: Ledger, watcher: SearchProgress
) -> dict[float, dict[str, Any]]:
    """Gives each tree what a descent from the uniform allocation comes by, and returns what its record says of it."""
    settings = run.config.search.descends
    if settings is None:
        return {}
    planned = len(trees) * most_evaluations(run.space, settings.rounds)
    damages = RecordedDamages(workers, ledger, planned, watcher=watcher)
    each = len(few_samples(run.config, run.searched_samples[0])[Few.MEASURE])
    found: dict[float, dict[str, Any]] = {}
    for target, tree in trees.items():
        before = damages.scored
        path = descend(run.space, tree.budget, settings.rounds, damages)
        for allocation in path:
            tree.add_start(allocation)
        record = {"scored": (damages.scored - before) * each, "path": [list(allocation.widths) for allocation in path]}
        found[target] = {"descent": record}
    damages.finish()
    return found


def build_trees(run: Run, starts: Mapping[float, Allocation] | None = None) -> dict[float, SearchTree]:
    """One tree for each target of the config, with its roots but for those scanned, which evaluations must come before.

    Args:
        starts: of each target; see `started`.

    Raises:
        LopError: a target is outside what the model's space allows, or two have the same budget.
    """
    settings = run.config.search
    budgets = {target: run.space.budget(target) for target in settings.targets.ratios}
    least = run.space.parts[0].cost * run.space.granularity
    if any(more - fewer < least for fewer, more in pairwise(sorted(budgets.values()))):
        raise LopError(f"search.targets.step {settings.targets.step} is too fine: two targets keep as many neurons")
    names = (UNIFORM.name, *(name for name in settings.roots if METHODS[name].root is not Root.SCANNED))
    return {
        target: SearchTree(
            run.space,
            [
                *([starts[target]] if starts else []),
                *(_root(run, name, target, budget) for name in names),
            ],
            settings.tree_options(),
            seed=(run.config.seed, budget),
            budget=budget,
            reward=lambda evaluation: evaluation.worth(settings.reward),
            tie_breaker=lambda evaluation: evaluation.worth(settings.tie_breaker),
        )
        for target, budget in budgets.items()
    }


def started(run: Run) -> dict[float, Allocation]:
    """By target what the run that `search.start` names has found: its largest answer that the budget holds.

    Where it had no attention open, that is dense; and what the budget has left is spent near by.

    Raises:
        LopError: there is no such search, it is of another model, or none of its answers is small enough.
    """
    if run.config.search.start is None:
        return {}
    file, space = Path(run.config.search.start) / run.search_file.name, run.space
    if not file.exists():
        raise LopError(f"search.start: {file} is missing: run `lop search` there first")
    made_from, answers = read_as(file, _answers)
    check_fingerprints(str(file), made_from, {"model": run.model_fingerprint})
    full = dense(space).widths
    answers = [Allocation(found.widths + full[len(found.widths) :]) for found in answers]
    if any(len(found.widths) != space.axes for found in answers):
        raise LopError(f"search.start: {file} has parts open that are not among {' and '.join(run.config.parts)}")
    starts = {}
    for target in run.config.search.targets.ratios:
        budget = space.budget(target)
        fits = [found for found in answers if space.cost(found.widths) <= budget]
        if not fits:
            raise LopError(f"search.start: {file} has no answer as small as target {target:.4g}")
        largest = max(fits, key=lambda found: space.cost(found.widths))
        starts[target] = project(largest.ratios(space), space, budget)
    return starts


def _answers(data: Any) -> tuple[dict[str, str], list[Allocation]]:
    made_from = {"model": data["fingerprints"]["model"]}
    return made_from, [Allocation(tuple(record["best"]["widths"])) for record in data["targets"]]


def _root(run: Run, name: str, target: float, budget: int) -> Allocation:
    method = METHODS[name]
    if method.root is Root.PREDICTED:
        return unsearched(run).allocate(budget)
    if method.start is not None:
        return method.suggest(statistics_for(run, method), run.space, budget)
    return rival_root(run, name, target)


@contextmanager
def _watched(
    run: Run, trees: Mapping[float, SearchTree], others: Sequence[Sink], *, shown: bool
) -> Iterator[SearchProgress]:
    """Progress as a bar on a terminal and as lines in a log, in the run's folder, and where else it goes."""
    sinks: list[tuple[float, Sink]] = [(_SECONDS_BETWEEN_STATUS, sink) for sink in (status_sink(run.location), *others)]
    is_terminal = shown and sys.stderr.isatty()
    with tqdm(desc="search", unit="evaluation", disable=not is_terminal, smoothing=0.05) as bar:
        if is_terminal:
            sinks.append((_SECONDS_BETWEEN_BARS, bar_sink(bar)))
        elif shown:
            sinks.append((_SECONDS_BETWEEN_LINES, log_sink))
        yield SearchProgress(trees, run.space, run.config.search.reward, sinks)


def _target_record(run: Run, target: float, tree: SearchTree, confirmed: Confirmed) -> dict[str, Any]:
    best = tree.confirmed(confirmed) if confirmed else tree.best[0]
    # The uniform allocation may not have been scored in full by the search, if it races.
    evaluation = tree.results.get(best) or confirmed[best]
    record = {
        "target": target,
        "budget": tree.budget,
        "simulations": tree.simulations,
        "depths": [asdict(depth) for depth in tree.depths()],
        "best": {"widths": list(best.widths), "ratios": list(best.ratios(run.space)), **evaluation.as_dict()},
        "evaluations": [
            {"widths": list(allocation.widths), **result.as_dict()} for allocation, result in tree.results.items()
        ],
    }
    if confirmed:
        record["confirmed"] = [{"widths": list(a.widths), **result.as_dict()} for a, result in confirmed.items()]
    return record


def _search_fingerprint(run: Run, starts: Mapping[float, Allocation]) -> str:
    config = run.config
    settings = [config.search.recorded("start"), config.seed, config.granularity, config.max_ratio]
    # Only where they are set, so that searches from before there were such settings keep their fingerprint.
    settings += [config.max_width_ratio] * (config.max_width_ratio is not None)
    settings += ["vanishing"] * run.space.vanishing
    return fingerprint(settings + [sorted(found.widths for found in starts.values())] * bool(starts))
