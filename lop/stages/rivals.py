"""The methods that search, run as jobs.

Each is given as many evaluations on the reward samples as a target's tree, and leaves the best allocation it found with
the curve of how it got there. A rival at a target and a seed is a job; jobs are independent, so a fleet runs them side
by side, and what is done already is not done again.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from lop.errors import LopError
from lop.methods.method import Method, Reward, Search
from lop.methods.registry import METHODS, SEARCHES
from lop.model.elastic import Repair
from lop.model.encoding import Encoded
from lop.model.samples import Sample, check_answers
from lop.run.building import Materials, Workshop
from lop.run.compute import Compute
from lop.run.outcomes import Outcome
from lop.run.run import Run
from lop.search.evaluator import Evaluator
from lop.search.loop import InProcess
from lop.search.racing import Candidate
from lop.space.allocation import Allocation, Space
from lop.stages.surveys import survey_stage
from lop.storage.files import read_as, write_json
from lop.storage.fingerprint import fingerprint


@dataclass(frozen=True)
class Job:
    """One rival with one seed: at one target, but for a search that answers all targets at once."""

    rival: str
    targets: tuple[float, ...]
    seed: int

    @property
    def method(self) -> Method:
        """Whose search it is."""
        return METHODS[self.rival]

    @property
    def search(self) -> Search:
        """What there is to run."""
        assert self.method.search is not None
        return self.method.search


def rivals_stage(
    run: Run,
    compute: Compute,
    *,
    rivals: Sequence[str] | None = None,
    targets: Sequence[float] | None = None,
    seeds: int = 1,
    progress: bool = True,
) -> list[Outcome]:
    """Every rival at every target and every seed; read where they are done, run where they are not.

    Args:
        rivals, targets: those of the tables by default.

    Raises:
        LopError: the statistics are missing, a target is outside what the model's space allows, or attention is open
            and a rival knows FFNs alone.
    """
    if run.config.search.needs_answers:
        check_answers(run.samples.reward, "the rivals' reward counts right answers in the reward samples")
    tables = run.config.tables
    asked = tables.rivals if rivals is None else rivals
    if run.space.attention and (narrow := [name for name in asked if not METHODS[name].is_of_axes]):
        able = ", ".join(name for name in SEARCHES if METHODS[name].is_of_axes)
        raise LopError(f"rival {narrow[0]} knows FFNs alone: with attention open (parts) take {able}")
    jobs = _jobs(run, asked, tables.targets if targets is None else targets, seeds)
    files = {job: run.folder / "rivals" / f"{_job_fingerprint(run, job)}.json" for job in jobs}
    waiting = [job for job in jobs if not files[job].exists()]
    if waiting:
        run.check_writable()
        survey_stage(run, compute, [job.rival for job in waiting], progress=progress)
    own = {job.method.importance or run.config.importance for job in waiting}
    orders = {importance: run.order_by(importance) for importance in own}
    build = partial(RivalWorker, Materials.of(run), run.samples.reward, run.space, orders)
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
    for job in _jobs(run, run.config.tables.rivals, run.config.tables.targets, 1):
        path = run.folder / "rivals" / f"{_job_fingerprint(run, job)}.json"
        if job.rival == rival and target in job.targets and path.exists():
            return next(Allocation(outcome.widths) for outcome in read_as(path, _outcomes) if outcome.target == target)
    raise LopError(
        f"search.roots: {rival} has not been run for target {target}: run `lop rivals` with it in tables.targets"
    )


def _outcomes(records: Any) -> list[Outcome]:
    return [Outcome.from_dict(record) for record in records]


def _jobs(run: Run, rivals: Sequence[str], targets: Sequence[float], seeds: int) -> list[Job]:
    jobs = []
    for rival in rivals:
        shared = Job(rival, tuple(targets), run.config.seed)
        each = [Job(rival, (t,), run.config.seed + s) for s in range(seeds) for t in targets]
        jobs += [shared] if shared.search.is_shared else each
    return jobs


def _job_fingerprint(run: Run, job: Job) -> str:
    config = run.config
    search = config.search.recorded_of_rivals()
    # Shares of the samples are drawn by the config's seed, whatever the job's.
    drawn = [config.seed] if min(job.search.shares) < 1 else []
    return fingerprint([run.evaluation_fingerprints, run.space.as_dict(), search, asdict(job), *drawn])


class RivalWorker:
    """Holds the model and the reward samples, and runs jobs on them.

    Args:
        orders: [L, F] neurons by each importance that a job prunes by, beside that of the materials.
    """

    def __init__(
        self,
        materials: Materials,
        samples: Sequence[Sample],
        space: Space,
        orders: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._config, self._workshop = materials.config, Workshop(materials)
        self._space = space
        self._orders = {**(orders or {}), materials.config.importance: materials.order}
        self._encoded: dict[float, Encoded] = {}
        # Shares of the samples are taken from a fixed shuffle, so that each is a fair sample of all.
        drawn = np.random.default_rng(self._config.seed).permutation(len(samples))
        self._shuffled = [samples[index] for index in drawn]
        self._importance: str | None = None
        self._repair: Repair | None = None
        self._evaluators: dict[tuple[float, bool, int], Evaluator] = {}  # Of that importance.

    def __call__(self, job: Job) -> list[Outcome]:
        """Runs a job: a function of the job, the config and the samples."""
        targets = {self._space.budget(target): target for target in job.targets}
        reward = self._reward(job.method.importance or self._config.importance, job.search.shares)
        start = time.perf_counter()
        found = list(job.search.run(self._space, reward, list(targets), job.seed))
        seconds = time.perf_counter() - start
        return [
            Outcome(job.rival, targets[at.budget], job.seed, at.best.widths, at.worth[0], at.curve, seconds)
            for at in found
        ]

    def _reward(self, importance: str, shares: Sequence[float]) -> Reward:
        settings, elastic = self._config.search, self._workshop.elastic
        if importance != self._importance:
            elastic.sort(self._orders[importance])
            self._repair = self._workshop.repair()
            self._importance, self._evaluators = importance, {}
        evaluators = {share: self._evaluator(share, settings.needs_divergence) for share in {1.0, *shares}}
        diverging = self._evaluator(1.0, True, self._config.cache_bytes)
        return Reward(
            evaluations=settings.evaluations,
            levels=settings.sensitivity_levels,
            options=settings.tree_options(),
            weights=elastic.weight_squares,
            reward=lambda evaluation: evaluation.worth(settings.reward),
            tie_breaker=lambda evaluation: evaluation.worth(settings.tie_breaker),
            evaluate=lambda allocation, share: evaluators[share].evaluate(Candidate(allocation)),
            workers=lambda: InProcess(evaluators[1.0]),
            with_divergence=lambda: InProcess(diverging),
        )

    def _evaluator(self, share: float, divergence: bool, cache_bytes: int = 0) -> Evaluator:
        """Kept for later jobs: what the dense model says to the samples is computed once."""
        key = share, divergence, cache_bytes
        if key not in self._evaluators:
            self._evaluators[key] = Evaluator(
                self._workshop.elastic,
                self._share(share),
                repair=self._repair,
                divergence=divergence,
                cache_bytes=cache_bytes,
            )
        return self._evaluators[key]

    def _share(self, share: float) -> Encoded:
        """The first share of the samples."""
        if share not in self._encoded:
            count = max(1, round(share * len(self._shuffled)))
            self._encoded[share] = self._workshop.encode(self._shuffled[:count])
        return self._encoded[share]
