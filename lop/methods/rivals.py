"""Rivals that search: random search, evolution, a sensitivity programme, and LOP's tree without roots.

Each is given as many evaluations on the reward samples as a target's tree, and leaves the best allocation it found with
the curve of how it got there. A rival at a target and a seed is a job; jobs are independent, so a fleet runs them side
by side, and what is done already is not done again.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lop.errors import LopError
from lop.methods.evolution import ROUNDS, Worth, evolve
from lop.model.adapter import load_model
from lop.model.elastic import ElasticModel
from lop.model.encoding import encode
from lop.model.find import find_model
from lop.model.samples import Sample, check_answers
from lop.run.compute import Compute
from lop.run.config import Config
from lop.run.run import Run
from lop.search.evaluation import Evaluation
from lop.search.evaluator import Evaluator
from lop.search.ledger import Ledger
from lop.search.loop import InProcess, run_search
from lop.search.sensitivity import best_additive, measure_damages
from lop.search.tree import SearchTree
from lop.space.allocation import Allocation, Space, project, uniform
from lop.storage.files import read_as, write_json
from lop.storage.fingerprint import fingerprint

# A target, the best allocation with its worth, and the curve.
_Result = tuple[float, Allocation, Worth, list[tuple[float, float]]]


@dataclass(frozen=True)
class Job:
    """One rival with one seed: at one target, but for the sensitivity scan, which answers all targets at once."""

    rival: str
    targets: tuple[float, ...]
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a rival found for a target.

    Attributes:
        widths: of the best allocation.
        reward: its reward on all reward samples.
        curve: pairs (evaluations spent, best reward so far); evaluations in units of all reward samples.
        seconds: that the job took, for all its targets.
    """

    rival: str
    target: float
    seed: int
    widths: tuple[int, ...]
    reward: float
    curve: tuple[tuple[float, float], ...]
    seconds: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Outcome":
        """The inverse of `asdict`, read from JSON."""
        curve = tuple((spent, reward) for spent, reward in data["curve"])
        return cls(**{**data, "widths": tuple(data["widths"]), "curve": curve})


def rivals_stage(run: Run, compute: Compute, *, seeds: int = 1, progress: bool = True) -> list[Outcome]:
    """Every rival at every target of the tables and every seed; read where they are done, run where they are not.

    Raises:
        LopError: the statistics are missing, or a target is outside what the model's space allows.
    """
    if run.config.search.needs_answers:
        check_answers(run.samples.reward, "the rivals' reward counts right answers in the reward samples")
    jobs = _jobs(run, seeds)
    files = {job: run.folder / "rivals" / f"{_job_fingerprint(run, job)}.json" for job in jobs}
    waiting = [job for job in jobs if not files[job].exists()]
    if waiting:
        run.check_writable()
    build = partial(RivalWorker, run.settled, run.order, run.samples.reward, run.space)
    results = compute.map(build, waiting, run.config)
    for job, outcomes in tqdm(results, desc="rivals", total=len(waiting), unit="job", disable=not progress):
        write_json(files[job], [asdict(outcome) for outcome in outcomes])
        run.keep(files[job])
    return [outcome for job in jobs for outcome in read_as(files[job], _outcomes)]


def rival_root(run: Run, rival: str, target: float) -> Allocation:
    """What a rival found for a target, for LOP's search to start from.

    Raises:
        LopError: it has not been run for that target.
    """
    for job in _jobs(run, 1):
        path = run.folder / "rivals" / f"{_job_fingerprint(run, job)}.json"
        if job.rival == rival and target in job.targets and path.exists():
            return next(Allocation(outcome.widths) for outcome in read_as(path, _outcomes) if outcome.target == target)
    raise LopError(
        f"search.roots: {rival} has not been run for target {target}: run `lop rivals` with it in tables.targets"
    )


def _outcomes(records: Any) -> list[Outcome]:
    return [Outcome.from_dict(record) for record in records]


def _jobs(run: Run, seeds: int) -> list[Job]:
    targets = run.config.tables.targets
    jobs = []
    for rival in run.config.tables.rivals:
        if rival == "sensitivity":  # Nothing is drawn by chance.
            jobs.append(Job(rival, targets, run.config.seed))
        else:
            jobs += [Job(rival, (t,), run.config.seed + s) for s in range(seeds) for t in targets]
    return jobs


def _job_fingerprint(run: Run, job: Job) -> str:
    config = run.config
    # A search may start from what a rival found: its roots and targets are none of the rival's.
    search = config.search.model_dump(mode="json", exclude={"roots", "targets"})
    # Evolution selects on shares of the samples, which the config's seed draws whatever the job's.
    drawn = [config.seed] if job.rival == "evolution" else []
    return fingerprint([run.evaluation_fingerprints, asdict(run.space), search, asdict(job), *drawn])


@contextmanager
def _temporary_ledger() -> Iterator[Ledger]:
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger", {}) as ledger:
        yield ledger


class RivalWorker:
    """Holds the model and the reward samples, and runs jobs on them.

    Args:
        order: [L, F] neurons of each layer, the most important first.
    """

    def __init__(self, config: Config, order: np.ndarray, samples: Sequence[Sample], space: Space) -> None:
        torch.set_num_threads(config.threads)
        self._config = config
        self._space = space
        model = load_model(find_model(config.model), device=config.device, dtype=config.dtype)
        # Shares of the samples are taken from a fixed shuffle, so that each is a fair sample of all.
        shuffled = [samples[index] for index in np.random.default_rng(config.seed).permutation(len(samples))]
        counts = {selection.share: max(1, round(selection.share * len(samples))) for selection in ROUNDS}
        encoded = {
            share: encode(model, shuffled[:count], batch_tokens=config.batch_tokens, images=config.images)
            for share, count in counts.items()
        }
        elastic = ElasticModel(model, order, compiled=config.compile)
        needed = config.search.needs_divergence
        self._evaluators = {share: Evaluator(elastic, part, divergence=needed) for share, part in encoded.items()}
        self._with_divergence = Evaluator(elastic, encoded[1.0], divergence=True, cache_bytes=config.cache_bytes)

    def __call__(self, job: Job) -> list[Outcome]:
        """Runs a job: a function of the job, the config and the samples."""
        run = {
            "random": self._random,
            "sensitivity": self._sensitivity,
            "evolution": self._evolution,
            "mcts-noroots": self._tree,
        }[job.rival]
        start = time.perf_counter()
        found = list(run(job))
        seconds = time.perf_counter() - start
        return [
            Outcome(job.rival, target, job.seed, best.widths, worth[0], tuple(curve), seconds)
            for target, best, worth, curve in found
        ]

    def _worth(self, allocation: Allocation, share: float = 1.0) -> Worth:
        return self._rank(self._evaluators[share].evaluate(allocation))

    def _rank(self, evaluation: Evaluation) -> Worth:
        settings = self._config.search
        return evaluation.worth(settings.reward), evaluation.worth(settings.tie_breaker)

    def _random(self, job: Job) -> Iterator[_Result]:
        """Random search: the moves that the tree makes at its root, always from the uniform allocation."""
        settings = self._config.search
        for target in job.targets:
            budget = self._space.budget(target)
            random = np.random.default_rng([job.seed, budget])
            best = uniform(self._space, budget)
            worth: Worth = (-np.inf,)
            curve: list[tuple[float, float]] = []
            for count in range(settings.evaluations):
                move = random.uniform(-settings.step, settings.step, self._space.layers) if count else 0.0
                allocation = project(
                    self._space.ratio(budget) + np.broadcast_to(move, self._space.layers), self._space, budget
                )
                best, worth = max((best, worth), (allocation, self._worth(allocation)), key=lambda item: item[1])
                curve.append((count + 1.0, worth[0]))
            yield target, best, worth, curve

    def _sensitivity(self, job: Job) -> Iterator[_Result]:
        """Each layer alone at each level, KL to the dense model; then the additive optimum for every target."""
        levels = self._config.search.sensitivity_levels
        with _temporary_ledger() as ledger:
            table = measure_damages(self._space, levels, InProcess(self._with_divergence), ledger)
            scanned = len(ledger)
        for target in job.targets:
            best = best_additive(self._space, table, self._space.budget(target))
            worth = self._worth(best)
            yield target, best, worth, [(scanned + 1.0, worth[0])]

    def _evolution(self, job: Job) -> Iterator[_Result]:
        for target in job.targets:
            budget = self._space.budget(target)
            steps = list(
                evolve(
                    uniform(self._space, budget),
                    self._space,
                    self._worth,
                    evaluations=self._config.search.evaluations,
                    seed=(job.seed, budget),
                    step=self._space.granularity,
                )
            )
            curve = [(step.spent, step.worth[0]) for step in steps]
            yield target, steps[-1].best, steps[-1].worth, curve

    def _tree(self, job: Job) -> Iterator[_Result]:
        """LOP's own search from the uniform allocation alone."""
        settings = self._config.search
        for target in job.targets:
            budget = self._space.budget(target)
            tree = SearchTree(
                self._space,
                [uniform(self._space, budget)],
                replace(settings.tree_options(), rival=0),  # Every rival scores all samples: no races.
                seed=(job.seed, budget),
                reward=lambda evaluation: evaluation.worth(settings.reward),
                tie_breaker=lambda evaluation: evaluation.worth(settings.tie_breaker),
            )
            with _temporary_ledger() as ledger:
                run_search({target: tree}, InProcess(self._evaluators[1.0]), ledger)
            rewards = np.maximum.accumulate([self._rank(evaluation)[0] for evaluation in tree.results.values()])
            best, evaluation = tree.best
            yield target, best, self._rank(evaluation), [(n + 1.0, float(r)) for n, r in enumerate(rewards)]
