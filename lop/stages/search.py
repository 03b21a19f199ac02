"""From statistics and reward samples to the best allocation of every target."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from operator import itemgetter
from typing import Any

from tqdm import tqdm

from lop.errors import LopError
from lop.methods.method import Root
from lop.methods.registry import METHODS
from lop.methods.uniform import METHOD as UNIFORM
from lop.model.samples import check_answers
from lop.run.compute import Compute
from lop.run.config import save_config
from lop.run.prediction import general_identity, unsearched
from lop.run.run import Run
from lop.run.surveys import statistics_for
from lop.search.confirmation import Confirmed, confirm
from lop.search.ledger import Ledger
from lop.search.loop import run_search
from lop.search.progress import SearchProgress, Sink, bar_sink, log_sink, status_sink
from lop.search.sensitivity import best_additive, measure_damages
from lop.search.tree import SearchTree
from lop.space.allocation import Allocation
from lop.stages.rivals import rival_root
from lop.stages.timing import timed
from lop.storage.files import read_as, write_json
from lop.storage.fingerprint import fingerprint

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_BARS = 0.2
_SECONDS_BETWEEN_STATUS = 2.0
_SECONDS_BETWEEN_LINES = 10.0


def search_stage(run: Run, compute: Compute, *, progress: bool = True) -> None:
    """Runs the search to its end, or takes it up where it was interrupted, and writes `search.json`."""
    fingerprints = {**run.evaluation_fingerprints, "search settings": _search_fingerprint(run)}
    if any(METHODS[name].root is Root.PREDICTED for name in run.config.search.roots):
        fingerprints["general predictor"] = general_identity(run)
    if run.search_file.exists() and read_as(run.search_file, itemgetter("fingerprints")) == fingerprints:
        log.info("search: %s is there already", run.search_file)
        return
    if run.config.search.needs_answers:
        check_answers(run.samples.reward, "the search's reward counts right answers in the reward samples")
    run.check_writable()
    trees = build_trees(run)
    with timed(run, "search"), Ledger(run.ledger, run.ledger_fingerprints) as ledger:
        save_config(run.settled, run.folder / "config.yaml")
        with compute.evaluators(run) as workers, _watched(run, trees, compute.sinks(), shown=progress) as watcher:
            if run.config.search.scans:
                levels = run.config.search.sensitivity_levels
                damages = measure_damages(run.space, levels, workers, ledger, watcher=watcher)
                for tree in trees.values():
                    tree.add_start(best_additive(run.space, damages, tree.budget))
            run_search(trees, workers, ledger, watcher=watcher)
            settings = run.config.search.confirm
            confirmed = confirm(trees, settings.candidates, workers, ledger, watcher.tick) if settings else {}
            watcher.finish(workers)
    write_json(
        run.search_file,
        {
            "fingerprints": fingerprints,
            "reward": run.config.search.reward,
            "targets": [_target_record(run, target, tree, confirmed.get(target, {})) for target, tree in trees.items()],
        },
    )


def build_trees(run: Run) -> dict[float, SearchTree]:
    """One tree for each target of the config, with its roots but for those scanned, which evaluations must come before.

    Raises:
        LopError: a target is outside what the model's space allows, or two have the same budget.
    """
    settings = run.config.search
    budgets = {target: run.space.budget(target) for target in settings.targets.ratios}
    if len(set(budgets.values())) < len(budgets):
        raise LopError(f"search.targets.step {settings.targets.step} is too fine: two targets keep as many neurons")
    names = (UNIFORM.name, *(name for name in settings.roots if METHODS[name].root is not Root.SCANNED))
    return {
        target: SearchTree(
            run.space,
            [_root(run, name, target, budget) for name in names],
            settings.tree_options(),
            seed=(run.config.seed, budget),
            reward=lambda evaluation: evaluation.worth(settings.reward),
            tie_breaker=lambda evaluation: evaluation.worth(settings.tie_breaker),
        )
        for target, budget in budgets.items()
    }


def _root(run: Run, name: str, target: float, budget: int) -> Allocation:
    method = METHODS[name]
    if method.root is Root.PREDICTED:
        return unsearched(run).allocate(budget)
    if method.start is not None:
        return method.start(statistics_for(run, method), run.space, budget)
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


def _search_fingerprint(run: Run) -> str:
    config = run.config
    settings = [config.search.recorded(), config.seed, config.granularity, config.max_ratio]
    # Only where it is set, so that searches from before there was such a bound keep their fingerprint.
    return fingerprint(settings + [config.max_width_ratio] * (config.max_width_ratio is not None))
