"""The stages from a model to a pruned checkpoint: each reads and writes plain files of a run."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lop.adapter import load_model
from lop.allocation import Allocation
from lop.baselines import root_allocation
from lop.checkpoint import export
from lop.config import Config, save_config
from lop.elastic import ElasticModel
from lop.encoding import encode
from lop.errors import LopError
from lop.evaluator import Evaluation, Evaluator
from lop.files import read_json, write_json
from lop.fingerprint import check_fingerprints, fingerprint, fingerprint_file
from lop.ledger import Ledger
from lop.predictors import Predictor, load_predictor
from lop.run import Run, shipped_run
from lop.search import InProcess, Workers, run_search
from lop.size import Target
from lop.statistics import calibrate
from lop.training import Fit, Pair, fit, split_pairs
from lop.tree import SearchTree

log = logging.getLogger(__name__)


def calibrate_stage(run: Run, *, progress: bool = True) -> None:
    """Writes the run's statistics, unless they are there already.

    Raises:
        LopError: the run's statistics were made with another model or other samples.
    """
    if run.statistics_file.exists():
        _ = run.statistics
        log.info("calibrate: %s is there already", run.statistics_file)
        return
    with _timed(run, "calibrate"):
        torch.set_num_threads(run.config.threads)
        model = load_model(run.model_folder, device=run.config.device, dtype=run.config.dtype)
        encoded = encode(model, run.samples.calibration, batch_tokens=run.config.batch_tokens)
        statistics = calibrate(model, encoded, progress=progress)
        statistics.save(run.statistics_file, run.calibration_fingerprints)


def build_evaluator(config: Config, folder: Path) -> Evaluator:
    """The evaluator of a run's reward samples; what each worker process calls once."""
    run = Run(config, folder)
    torch.set_num_threads(config.threads)
    model = load_model(run.model_folder, device=config.device, dtype=config.dtype)
    encoded = encode(model, run.samples.reward, batch_tokens=config.batch_tokens)
    return Evaluator(ElasticModel(model, run.order), encoded)


def build_trees(run: Run) -> dict[float, SearchTree]:
    """One tree for each target of the config.

    Raises:
        LopError: a target is outside what the model's space allows, or two have the same budget.
    """
    settings = run.config.search
    budgets = {target: run.space.budget(target) for target in settings.targets.ratios}
    if len(set(budgets.values())) < len(budgets):
        raise LopError(f"search.targets.step {settings.targets.step} is too fine: two targets keep as many neurons")
    names = ("uniform", *settings.roots)
    return {
        target: SearchTree(
            run.space,
            [root_allocation(name, run.statistics, run.space, budget) for name in names],
            settings.tree_options(),
            seed=(run.config.seed, budget),
            reward=lambda evaluation: float(getattr(evaluation, settings.reward)),
        )
        for target, budget in budgets.items()
    }


def search_stage(run: Run, *, progress: bool = True) -> None:
    """Runs the search to its end, or takes it up where it was interrupted, and writes `search.json`."""
    fingerprints = {**run.evaluation_fingerprints, "search settings": _search_fingerprint(run)}
    if run.search_file.exists() and read_json(run.search_file)["fingerprints"] == fingerprints:
        log.info("search: %s is there already", run.search_file)
        return
    trees = build_trees(run)
    with _timed(run, "search"), Ledger(run.ledger_file, run.evaluation_fingerprints) as ledger:
        save_config(run.config, run.folder / "config.yaml")
        with _workers(run) as workers, _search_bar(trees, ledger, shown=progress) as update:
            run_search(trees, workers, ledger, on_commit=update)
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
    """One target's search result: the best allocation and all evaluated ones in commit order."""

    target: float
    best: Allocation
    evaluations: tuple[tuple[Allocation, Evaluation], ...]


def read_search(run: Run) -> list[Found]:
    """The search's results by target.

    Raises:
        LopError: the search has not been run, or was run with another model or other samples.
    """
    if not run.search_file.exists():
        raise LopError(f"{run.search_file} is missing: run `lop search` first")
    data = read_json(run.search_file)
    check_fingerprints(str(run.search_file), data["fingerprints"], run.evaluation_fingerprints)
    return [
        Found(
            record["target"],
            Allocation(tuple(record["best"]["widths"])),
            tuple((Allocation(tuple(entry.pop("widths"))), Evaluation(**entry)) for entry in record["evaluations"]),
        )
        for record in data["targets"]
    ]


def predictor_for(run: Run | None, config: Config) -> Predictor:
    """The run's predictor, or the one that ships for the model.

    Raises:
        LopError: there is none, it is damaged, or it was made with another model.
    """
    owner = run or _shipped(config)
    predictor = load_predictor(owner.predictor_folder)
    check_fingerprints(str(owner.predictor_folder), predictor.fingerprints, {"model": owner.model_fingerprint})
    return predictor


def prune_stage(run: Run | None, config: Config, target: Target, out: Path, *, progress: bool = True) -> Allocation:
    """Predicts the target's allocation and writes the checkpoint.

    Raises:
        LopError: the target cannot be met, or something that the run needs is missing or damaged.
    """
    owner = run or _shipped(config)
    predictor = predictor_for(run, config)
    budget = target.budget(predictor.space, predictor.size)
    allocation = predictor.allocate(budget)
    export_allocation(owner, allocation, out, target=predictor.space.ratio(budget), progress=progress)
    return allocation


def export_allocation(run: Run, allocation: Allocation, out: Path, *, target: float, progress: bool = True) -> None:
    """Writes the checkpoint of an allocation in the run's importance order."""
    about = {
        "source": run.config.model,
        "target": target,
        "importance": run.config.importance,
        "fingerprints": run.calibration_fingerprints,
    }
    export(run.model_folder, out, allocation, run.order, about=about, progress=progress)


def _shipped(config: Config) -> Run:
    run = shipped_run(config)
    if run is None:
        raise LopError(f"nothing ships for model {config.model!r}: name the --run folder of its search")
    return run


def train_stage(run: Run, *, progress: bool = True) -> None:
    """Trains each architecture on the search's pairs, keeps the best of each, and of those the one that scores best.

    Writes `predictors/<architecture>`, `predictor` (the best one) and `predictors.json` (the comparison).

    Raises:
        LopError: the search has not been run, or has too few targets to hold one out.
    """
    report = run.folder / "predictors.json"
    found = read_search(run)
    fingerprints = {**run.evaluation_fingerprints, "pairs": fingerprint_file(run.search_file)}
    made = {**fingerprints, "training settings": fingerprint(run.config.train.model_dump(mode="json"))}
    if report.exists() and run.predictor_folder.exists() and read_json(report)["fingerprints"] == made:
        log.info("train: %s is there already", run.predictor_folder)
        return
    settings = run.config.train
    with _timed(run, "train"):
        training, validation = split_pairs(_pairs(run, found), settings.validation_share)
        fits = _fit_all(run, training, validation, progress=progress)
        best = [min(group, key=lambda fit: fit.validation_error) for group in _by_architecture(fits)]
        predictors = [Predictor(fit.architecture, fit.weights, run.space, run.size, fingerprints) for fit in best]
        rewards = _rewards(run, predictors, sorted({pair.target for pair in validation}), progress=progress)
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
                    "parameters": sum(tensor.numel() for tensor in fit.weights.values()),
                }
                for fit, reward in zip(best, rewards)
            ],
        },
    )


def _pairs(run: Run, found: Sequence[Found]) -> list[Pair]:
    """For each target the best evaluated allocations: their spread tells the network what does not matter."""
    reward = run.config.search.reward
    pairs = []
    for result in found:
        ranked = sorted(
            result.evaluations, key=lambda item: (getattr(item[1], reward), item[1].log_probability), reverse=True
        )
        for allocation, _ in ranked[: run.config.train.best_per_target]:
            pairs.append(Pair(run.space.ratio(allocation.budget), allocation.ratios(run.space)))
    return pairs


def _fit_all(run: Run, training: Sequence[Pair], validation: Sequence[Pair], *, progress: bool) -> list[Fit]:
    """One fit for each architecture and learning rate: in this process, or by Ray Tune with the same result."""
    settings = run.config.train
    if run.config.workers:
        from ray_jobs.train import tune_fits

        return tune_fits(
            training, validation, settings, seed=run.config.seed, storage=run.folder / "tune", progress=progress
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
    """Each predictor's mean reward over the held-out targets, on the reward samples."""
    evaluator = build_evaluator(run.config, run.folder)
    rewards = []
    for predictor in tqdm(predictors, desc="train: score predictors", unit="predictor", disable=not progress):
        results = [evaluator.evaluate(predictor.allocate(run.space.budget(target))) for target in targets]
        rewards.append(sum(getattr(result, run.config.search.reward) for result in results) / len(results))
    return rewards


@contextmanager
def _workers(run: Run) -> Iterator[Workers]:
    """This process (`workers: 0`) or a fleet of Ray actors; the results are the same."""
    config = run.config
    if config.workers == 0:
        yield InProcess(build_evaluator(config, run.folder))
        return
    from ray_jobs.search import evaluator_fleet

    with evaluator_fleet(config, run.folder) as fleet:
        yield fleet


@contextmanager
def _search_bar(trees: Mapping[float, SearchTree], ledger: Ledger, *, shown: bool):  # type: ignore[no-untyped-def]
    limit = sum(tree.limit for tree in trees.values())
    with tqdm(total=limit, desc="search", unit="evaluation", disable=not shown, smoothing=0.05) as bar:

        def update(trees: Mapping[float, SearchTree]) -> None:
            bar.update(sum(len(tree.results) for tree in trees.values()) - bar.n)

        yield update


def _target_record(run: Run, target: float, tree: SearchTree) -> dict[str, Any]:
    best, evaluation = tree.best
    return {
        "target": target,
        "budget": tree.budget,
        "simulations": tree.simulations,
        "best": {"widths": list(best.widths), "ratios": list(best.ratios(run.space)), **evaluation.as_dict()},
        "evaluations": [
            {"widths": list(allocation.widths), **result.as_dict()} for allocation, result in tree.results.items()
        ],
    }


def _search_fingerprint(run: Run) -> str:
    config = run.config
    return fingerprint([config.search.model_dump(mode="json"), config.seed, config.granularity, config.max_ratio])


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
