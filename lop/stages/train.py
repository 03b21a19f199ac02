"""From what the search found to a predictor."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from tqdm import tqdm

from lop.predictor.predictor import Predictor
from lop.predictor.training import Fit, Pair, fit, split_pairs
from lop.predictor.unsearched import Answering
from lop.run.compute import Compute
from lop.run.features import features_file
from lop.run.prediction import unsearched
from lop.run.results import Found, read_search
from lop.run.run import Run
from lop.run.settings import TrainSettings
from lop.search.evaluation import Evaluation
from lop.search.ledger import Ledger
from lop.search.loop import evaluate_recorded
from lop.search.racing import Candidate
from lop.space.allocation import Allocation
from lop.stages.timing import timed
from lop.storage.files import read_as, write_json
from lop.storage.fingerprint import fingerprint, fingerprint_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """Trains a network of an architecture and a learning rate."""

    training: Sequence[Pair]
    validation: Sequence[Pair]
    settings: TrainSettings
    seed: int

    def __call__(self, item: tuple[str, float]) -> tuple[float, Fit]:
        """The validation error, and the fit."""
        architecture, learning_rate = item
        found = fit(
            architecture,
            self.training,
            self.validation,
            epochs=self.settings.epochs,
            batch=self.settings.batch,
            learning_rate=learning_rate,
            seed=self.seed,
        )
        return found.validation_error, found


def train_stage(run: Run, compute: Compute, *, progress: bool = True) -> None:
    """Trains each architecture on the search's pairs, keeps the best of each, and of those the one that scores best.

    Writes `predictors/<architecture>`, `predictor` (the best one, which knows the search's answers, too: see
    `Predictor`) and `predictors.json` (the comparison, of networks alone). Where the model's features are known, the
    general predictor is compared, too; what was trained for the model answers.

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
    with timed(run, "train"):
        training, validation = split_pairs(_pairs(run, found), settings.validation_share)
        trial = Trial(training, validation, settings, run.config.seed)
        fits = compute.tune(trial, _trials(settings), run.location / "tune", progress=progress)
        best = [min(group, key=lambda fit: fit.validation_error) for group in _by_architecture(fits)]
        predictors = [Predictor(fit.architecture, fit.weights, run.space, run.size, fingerprints) for fit in best]
        # At all targets, trained on or held out: the networks differ most at the ends of the range, which are never
        # held out, and a handful of targets does not tell them apart.
        others = [unsearched(run)] if features_file(run).exists() else []
        scored: list[Answering] = [*predictors, *others]
        rewards = _rewards(run, compute, scored, [result.target for result in found], progress=progress)
        for predictor in predictors:
            predictor.save(run.predictors_folder / predictor.architecture)
        chosen = max(range(len(best)), key=lambda index: (rewards[index], -best[index].validation_error))
        replace(predictors[chosen], known=tuple(result.best for result in found)).save(run.predictor_folder)
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
            "others": [{"source": of.source, "reward": reward} for of, reward in zip(others, rewards[len(best) :])],
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
            pairs.append(Pair(run.space.ratio_of(allocation.widths), allocation.ratios(run.space)))
    return pairs


def _trials(settings: TrainSettings) -> dict[str, tuple[str, float]]:
    return {f"{name} {rate}": (name, rate) for name in settings.architectures for rate in settings.learning_rates}


def _by_architecture(fits: Sequence[Fit]) -> list[list[Fit]]:
    names = dict.fromkeys(fit.architecture for fit in fits)
    return [[fit for fit in fits if fit.architecture == name] for name in names]


def _rewards(
    run: Run, compute: Compute, predictors: Sequence[Answering], targets: Sequence[float], *, progress: bool
) -> list[float]:
    """Each predictor's mean reward over targets, on the reward samples; what the ledger holds is not scored again."""
    predicted = [[predictor.allocate(run.space.budget(target)) for target in targets] for predictor in predictors]
    wanted = list(dict.fromkeys(allocation for allocations in predicted for allocation in allocations))
    with (
        Ledger(run.ledger, run.ledger_fingerprints) as ledger,
        compute.evaluators(run) as workers,
        tqdm(total=len(wanted), desc="train: score predictors", unit="evaluation", disable=not progress) as bar,
    ):
        found = evaluate_recorded(list(map(Candidate, wanted)), workers, ledger, lambda done: bar.update(done - bar.n))
    reward = run.config.search.reward
    return [sum(found[a].worth(reward) for a in allocations) / len(allocations) for allocations in predicted]


def _training_fingerprint(run: Run) -> str:
    """Of what predictors depend on besides the search's pairs: of these the best by the reward are learned from."""
    config = run.config
    ranked_by = [config.search.reward, config.search.tie_breaker]
    return fingerprint([config.train.model_dump(mode="json"), config.seed, run.space.as_dict(), ranked_by])
