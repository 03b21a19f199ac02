"""The stages from a model to a pruned checkpoint: each reads and writes plain files of a run."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lop import __version__
from lop.checkpoint.export import export
from lop.checkpoint.footprint import Footprint
from lop.checkpoint.formats import Format, check_format
from lop.checkpoint.recoveries import RECOVERIES, Recovery
from lop.checkpoint.recovery import recover_checkpoint
from lop.errors import CancelledError, LopError
from lop.methods.method import Root
from lop.methods.registry import METHODS
from lop.model.adapter import load_model
from lop.model.elastic import ElasticModel
from lop.model.encoding import encode
from lop.model.find import EMBEDDED, find_model
from lop.model.samples import Sample, check_answers
from lop.model.statistics import calibrate
from lop.predictor.predictor import Predictor
from lop.predictor.training import Fit, Pair, fit, split_pairs
from lop.run.config import Config, save_config
from lop.run.prediction import predictor_for, what_ships
from lop.run.run import Run
from lop.run.spectra import statistics_for
from lop.search.evaluation import Evaluation
from lop.search.evaluator import Evaluator
from lop.search.ledger import Ledger
from lop.search.loop import InProcess, Workers, evaluate_each, run_search
from lop.search.progress import SearchProgress, Sink, bar_sink, log_sink, status_sink
from lop.search.racing import Racing, sample_rounds
from lop.search.sensitivity import best_additive, measure_damages
from lop.search.tree import Depth, SearchTree
from lop.space.allocation import Allocation
from lop.space.size import Target
from lop.stages.rivals import rival_root
from lop.storage.destination import check_new
from lop.storage.files import read_as, write_json
from lop.storage.fingerprint import check_fingerprints, fingerprint, fingerprint_file
from lop.storage.location import Location

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_BARS = 0.2
_SECONDS_BETWEEN_STATUS = 2.0
_SECONDS_BETWEEN_LINES = 10.0
Progress = Callable[[str, int, int], None]


def calibrate_stage(run: Run, *, progress: bool = True) -> None:
    """Writes the run's statistics, unless they are there already.

    Raises:
        LopError: the run's statistics were made with another model or other samples.
    """
    if run.statistics_file.exists():
        _ = run.statistics
        log.info("calibrate: %s is there already", run.statistics_file)
        return
    # What does not fit is told before the model is loaded.
    _, samples = run.space, run.samples.calibration
    run.check_writable()
    _warn_of_samples(run)
    with _timed(run, "calibrate"):
        torch.set_num_threads(run.config.threads)
        log.info("calibrate: loading the model, then %d samples go through its tower", len(run.samples.calibration))
        model = load_model(run.model_folder, device=run.config.device, dtype=run.config.dtype)
        encoded = encode(model, samples, batch_tokens=run.config.batch_tokens, images=run.config.images)
        statistics = calibrate(model, encoded, progress=progress)
        statistics.save(run.statistics_file, run.calibration_fingerprints)


def _warn_of_samples(run: Run) -> None:
    if run.config.samples == EMBEDDED != run.config.model:
        log.warning(
            "samples %r are small pictures with simple questions, made for the embedded model: good for a try; "
            "for real use name a folder with your own (samples: README, 'Your own samples')",
            EMBEDDED,
        )


def build_evaluator(config: Config, order: np.ndarray, samples: Sequence[Sample]) -> Evaluator:
    """An evaluator on the given samples; what each worker process calls once.

    Args:
        order: [L, F] neurons of each layer, the most important first.
    """
    torch.set_num_threads(config.threads)
    model = load_model(find_model(config.model), device=config.device, dtype=config.dtype)
    races = config.search.racing
    rounds = sample_rounds(len(samples), races.rounds, seed=config.seed) if races else None
    encoded = encode(model, samples, batch_tokens=config.batch_tokens, rounds=rounds, images=config.images)
    return Evaluator(
        ElasticModel(model, order, compiled=config.compile),
        encoded,
        racing=Racing(races.rounds, races.confidence) if races else None,
        divergence=config.search.needs_divergence,
        cache_bytes=config.cache_bytes,
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
    names = ("uniform", *(name for name in settings.roots if METHODS[name].root is not Root.SCANNED))
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
    if method.start is not None:
        return method.start(statistics_for(run, method), run.space, budget)
    return rival_root(run, name, target)


def search_stage(run: Run, *, progress: bool = True) -> None:
    """Runs the search to its end, or takes it up where it was interrupted, and writes `search.json`."""
    fingerprints = {**run.evaluation_fingerprints, "search settings": _search_fingerprint(run)}
    if run.search_file.exists() and read_as(run.search_file, itemgetter("fingerprints")) == fingerprints:
        log.info("search: %s is there already", run.search_file)
        return
    if run.config.search.needs_answers:
        check_answers(run.samples.reward, "the search's reward counts right answers in the reward samples")
    run.check_writable()
    trees = build_trees(run)
    with _timed(run, "search"), Ledger(run.ledger, run.ledger_fingerprints) as ledger:
        save_config(run.settled, run.folder / "config.yaml")
        with _workers(run) as workers, _watched(run, trees, shown=progress) as watcher:
            if run.config.search.scans:
                levels = run.config.search.sensitivity_levels
                damages = measure_damages(run.space, levels, workers, ledger, watcher=watcher)
                for tree in trees.values():
                    tree.add_start(best_additive(run.space, damages, tree.budget))
            run_search(trees, workers, ledger, watcher=watcher)
            watcher.finish(workers)
    write_json(
        run.search_file,
        {
            "fingerprints": fingerprints,
            "reward": run.config.search.reward,
            "targets": [_target_record(run, target, tree) for target, tree in trees.items()],
        },
    )


@dataclass(frozen=True)
class Found:
    """One target's search result: the best allocation, all evaluated ones in commit order, and the tree's shape."""

    target: float
    best: Allocation
    evaluations: tuple[tuple[Allocation, Evaluation], ...]
    depths: tuple[Depth, ...]


def read_search(run: Run) -> list[Found]:
    """The search's results by target.

    Raises:
        LopError: the search has not been run, or was run with another model or other samples.
    """
    if not run.search_file.exists():
        raise LopError(f"{run.search_file} is missing: run `lop search` first")
    made_from, found = read_as(run.search_file, _parse_search)
    check_fingerprints(str(run.search_file), made_from, run.evaluation_fingerprints)
    return found


def _parse_search(data: Any) -> tuple[dict[str, str], list[Found]]:
    found = [
        Found(
            record["target"],
            Allocation(tuple(record["best"]["widths"])),
            tuple(
                (Allocation(tuple(entry.pop("widths"))), Evaluation.from_dict(entry)) for entry in record["evaluations"]
            ),
            tuple(Depth(**depth) for depth in record.get("depths", [])),  # Earlier searches did not tell.
        )
        for record in data["targets"]
    ]
    return dict(data["fingerprints"]), found


def prune_stage(
    run: Run | None,
    config: Config,
    target: Target,
    out: str | Path,
    *,
    format: Format = "hf",
    progress: Progress = lambda step, done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Predicts the target's allocation and writes the checkpoint; see `export_allocation`.

    Raises:
        LopError: the target cannot be met, or something that the run needs is missing or damaged.
    """
    predictor = predictor_for(run, config)
    footprint = Footprint(predictor.size, format, config.recovery)
    allocation = footprint.allocate(target, predictor.space, predictor.allocate)
    return export_allocation(
        run or what_ships(config),
        allocation,
        out,
        target=predictor.space.ratio(allocation.budget),
        format=format,
        progress=progress,
        cancelled=cancelled,
    )


def export_allocation(
    run: Run,
    allocation: Allocation,
    out: str | Path | Location,
    *,
    target: float,
    format: Format = "hf",
    recovery: Recovery | None = None,
    scratch: Path | None = None,
    progress: Progress = lambda step, done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Writes the checkpoint of an allocation in the run's importance order; it appears whole or not at all.

    Recovery `refit` runs the calibration samples through the model twice, one layer in memory at a time; the others,
    and the writing itself, build no model.

    Args:
        out: a new folder: a local path, a URI that pyarrow knows, such as `s3://bucket/folder`, or a location.
        target: the pruning ratio that was asked for; goes into the manifest.
        recovery: None takes the config's.
        scratch: where recovery keeps a folder while it runs; by default the system's place for temporary files.
        progress: called in this thread with the step (`"recover"`, counted in layers, or `"export"`, in bytes), how
            much of it is done, and how much it is in all.
        cancelled: asked after each layer, and about every 8 MiB, whether to give up.

    Returns:
        The checkpoint's manifest, as it stands in its `lop.json`.

    Raises:
        LopError: the format cannot hold what recovery adds, `out` is there already, or the run lacks something.
        CancelledError: `cancelled` said so.
        OSError: the disk is full or read-only. After any error nothing is left behind.
    """
    recovery = recovery or run.config.recovery
    check_format(format, recovery)
    place = Location.parse(out)
    check_new(place, bytes=Footprint(run.size, format, recovery).bytes(allocation.widths))
    torch.set_num_threads(run.config.threads)
    about = {
        "version": __version__,
        "source": run.config.model,
        "target": target,
        "importance": run.config.importance,
        "recovery": recovery,
        "fingerprints": run.calibration_fingerprints,
    }

    def on_layer(done: int, total: int) -> None:
        if cancelled():
            raise CancelledError("the export was cancelled")
        progress("recover", done, total)

    if RECOVERIES[recovery].refits:
        _warn_of_samples(run)
    with TemporaryDirectory(prefix="lop-recovery-", dir=scratch) as folder:
        recovered = recover_checkpoint(
            run.model_folder,
            allocation,
            recovery,
            Path(folder),
            order=run.order,
            means=run.statistics.mean,
            samples=run.samples.calibration,
            batch_tokens=run.config.batch_tokens,
            images=run.config.images,
            device=run.config.device,
            dtype=run.config.dtype,
            progress=on_layer,
        )
        return export(
            run.model_folder,
            place,
            allocation,
            run.order,
            about=about,
            format=format,
            recovered=recovered,
            progress=lambda done, total: progress("export", done, total),
            cancelled=cancelled,
        )


def train_stage(run: Run, *, progress: bool = True) -> None:
    """Trains each architecture on the search's pairs, keeps the best of each, and of those the one that scores best.

    Writes `predictors/<architecture>`, `predictor` (the best one) and `predictors.json` (the comparison).

    Raises:
        LopError: the search has not been run, or has too few targets to hold one out.
    """
    report = run.folder / "predictors.json"
    found = read_search(run)
    fingerprints = {**run.evaluation_fingerprints, "pairs": fingerprint_file(run.search_file)}
    made = {**fingerprints, "training settings": _training_fingerprint(run)}
    if report.exists() and run.predictor_folder.exists() and read_as(report, itemgetter("fingerprints")) == made:
        log.info("train: %s is there already", run.predictor_folder)
        return
    run.check_writable()
    settings = run.config.train
    with _timed(run, "train"):
        training, validation = split_pairs(_pairs(run, found), settings.validation_share)
        fits = _fit_all(run, training, validation, progress=progress)
        best = [min(group, key=lambda fit: fit.validation_error) for group in _by_architecture(fits)]
        predictors = [Predictor(fit.architecture, fit.weights, run.space, run.size, fingerprints) for fit in best]
        # At all targets, trained on or held out: the networks differ most at the ends of the range, which are never
        # held out, and a handful of targets does not tell them apart.
        rewards = _rewards(run, predictors, [result.target for result in found], progress=progress)
        for predictor in predictors:
            predictor.save(run.predictors_folder / predictor.architecture)
        chosen = max(range(len(best)), key=lambda index: (rewards[index], -best[index].validation_error))
        predictors[chosen].save(run.predictor_folder)
    write_json(
        report,
        {
            "fingerprints": made,
            "chosen": best[chosen].architecture,
            "training_targets": sorted({pair.target for pair in training}),
            "validation_targets": sorted({pair.target for pair in validation}),
            "architectures": [
                {
                    "architecture": fit.architecture,
                    "learning_rate": fit.learning_rate,
                    "validation_error": fit.validation_error,
                    "reward": reward,
                    "parameters": sum(array.size for array in fit.weights.values()),
                }
                for fit, reward in zip(best, rewards)
            ],
        },
    )


def _pairs(run: Run, found: Sequence[Found]) -> list[Pair]:
    """For each target the best evaluated allocations: their spread tells the network what does not matter."""
    settings = run.config.search

    def key(item: tuple[Allocation, Evaluation]) -> tuple[float, float]:
        return item[1].worth(settings.reward), item[1].worth(settings.tie_breaker)

    pairs = []
    for result in found:
        ranked = sorted((item for item in result.evaluations if item[1].is_complete), key=key, reverse=True)
        for allocation, _ in ranked[: run.config.train.best_per_target]:
            pairs.append(Pair(run.space.ratio(allocation.budget), allocation.ratios(run.space)))
    return pairs


def _fit_all(run: Run, training: Sequence[Pair], validation: Sequence[Pair], *, progress: bool) -> list[Fit]:
    """One fit for each architecture and learning rate: in this process, or by Ray Tune with the same result."""
    settings = run.config.train
    if run.config.workers:
        from ray_jobs.train import tune_fits

        return tune_fits(
            training,
            validation,
            settings,
            seed=run.config.seed,
            storage=(run.location / "tune").uri,
            progress=progress,
        )
    torch.set_num_threads(run.config.threads)
    return [
        fit(
            architecture,
            training,
            validation,
            epochs=settings.epochs,
            batch=settings.batch,
            learning_rate=rate,
            seed=run.config.seed,
        )
        for architecture in settings.architectures
        for rate in settings.learning_rates
    ]


def _by_architecture(fits: Sequence[Fit]) -> list[list[Fit]]:
    names = dict.fromkeys(fit.architecture for fit in fits)
    return [[fit for fit in fits if fit.architecture == name] for name in names]


def _rewards(run: Run, predictors: Sequence[Predictor], targets: Sequence[float], *, progress: bool) -> list[float]:
    """Each predictor's mean reward over targets, on the reward samples."""
    predicted = [[predictor.allocate(run.space.budget(target)) for target in targets] for predictor in predictors]
    wanted = list(dict.fromkeys(allocation for allocations in predicted for allocation in allocations))
    found: dict[Allocation, Evaluation] = {}
    with (
        _workers(run) as workers,
        tqdm(total=len(wanted), desc="train: score predictors", unit="evaluation", disable=not progress) as bar,
    ):
        for results in evaluate_each(wanted, workers):
            found |= dict(results)
            bar.update(len(results))
    reward = run.config.search.reward
    return [sum(found[a].worth(reward) for a in allocations) / len(allocations) for allocations in predicted]


@contextmanager
def _workers(run: Run) -> Iterator[Workers]:
    """This process (`workers: 0`) or a fleet of Ray actors; the results are the same."""
    config = run.settled
    if config.workers == 0:
        yield InProcess(build_evaluator(config, run.order, run.samples.reward))
        return
    from ray_jobs.search import evaluator_fleet

    with evaluator_fleet(config, run.order, run.samples.reward) as fleet:
        yield fleet


@contextmanager
def _watched(run: Run, trees: Mapping[float, SearchTree], *, shown: bool) -> Iterator[SearchProgress]:
    """Progress as a bar on a terminal and as lines in a log, in the run's folder, and as metrics of the cluster."""
    sinks: list[tuple[float, Sink]] = [(_SECONDS_BETWEEN_STATUS, status_sink(run.location))]
    if run.config.workers:
        from ray_jobs.metrics import metrics_sink

        sinks.append((_SECONDS_BETWEEN_STATUS, metrics_sink()))
    is_terminal = shown and sys.stderr.isatty()
    with tqdm(desc="search", unit="evaluation", disable=not is_terminal, smoothing=0.05) as bar:
        if is_terminal:
            sinks.append((_SECONDS_BETWEEN_BARS, bar_sink(bar)))
        elif shown:
            sinks.append((_SECONDS_BETWEEN_LINES, log_sink))
        yield SearchProgress(trees, run.space, run.config.search.reward, sinks)


def _target_record(run: Run, target: float, tree: SearchTree) -> dict[str, Any]:
    best, evaluation = tree.best
    return {
        "target": target,
        "budget": tree.budget,
        "simulations": tree.simulations,
        "depths": [asdict(depth) for depth in tree.depths()],
        "best": {"widths": list(best.widths), "ratios": list(best.ratios(run.space)), **evaluation.as_dict()},
        "evaluations": [
            {"widths": list(allocation.widths), **result.as_dict()} for allocation, result in tree.results.items()
        ],
    }


def _search_fingerprint(run: Run) -> str:
    config = run.config
    settings = [config.search.model_dump(mode="json"), config.seed, config.granularity, config.max_ratio]
    # Only where it is set, so that searches from before there was such a bound keep their fingerprint.
    return fingerprint(settings + [config.max_width_ratio] * (config.max_width_ratio is not None))


def _training_fingerprint(run: Run) -> str:
    """Of what predictors depend on besides the search's pairs: of these the best by the reward are learned from."""
    config = run.config
    ranked_by = [config.search.reward, config.search.tie_breaker]
    return fingerprint([config.train.model_dump(mode="json"), config.seed, asdict(run.space), ranked_by])


@contextmanager
def _timed(run: Run, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    except KeyboardInterrupt:
        run.add_seconds(stage, time.perf_counter() - start)
        raise
    # What fails leaves nothing behind, not even its time.
    run.add_seconds(stage, time.perf_counter() - start)
