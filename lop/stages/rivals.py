"""The methods that search, run as jobs.

Each is given as many evaluations on the reward samples as a target's tree, and leaves the best allocation it found with
the curve of how it got there. A rival at a target and a seed is a job; jobs are independent, so a fleet runs them side
by side, and what is done already is not done again.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from lop.errors import LopError
from lop.methods.method import Reward, Search
from lop.methods.registry import METHODS
from lop.model.samples import Sample, check_answers
from lop.run.building import Materials, Workshop
from lop.run.compute import Compute
from lop.run.outcomes import Outcome
from lop.run.run import Run
from lop.search.evaluator import Evaluator
from lop.search.loop import InProcess
from lop.search.racing import Candidate
from lop.space.allocation import Allocation, Space
from lop.storage.files import read_as, write_json
from lop.storage.fingerprint import fingerprint


@dataclass(frozen=True)
class Job:
    """One rival with one seed: at one target, but for a search that answers all targets at once."""

    rival: str
    targets: tuple[float, ...]
    seed: int

    @property
    def search(self) -> Search:
        """What there is to run."""
        found = METHODS[self.rival].search
        assert found is not None
        return found


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
    build = partial(RivalWorker, Materials.of(run), run.samples.reward, run.space)
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
        shared = Job(rival, targets, run.config.seed)
        each = [Job(rival, (t,), run.config.seed + s) for s in range(seeds) for t in targets]
        jobs += [shared] if shared.search.is_shared else each
    return jobs


def _job_fingerprint(run: Run, job: Job) -> str:
    config = run.config
    # A search may start from what a rival found: its roots and targets are none of the rival's.
    search = config.search.recorded("roots", "targets", "confirm")
    # Shares of the samples are drawn by the config's seed, whatever the job's.
    drawn = [config.seed] if min(job.search.shares) < 1 else []
    return fingerprint([run.evaluation_fingerprints, asdict(run.space), search, asdict(job), *drawn])


class RivalWorker:
    """Holds the model and the reward samples, and runs jobs on them."""

    def __init__(self, materials: Materials, samples: Sequence[Sample], space: Space) -> None:
        config, workshop = materials.config, Workshop(materials)
        self._space = space
        # Shares of the samples are taken from a fixed shuffle, so that each is a fair sample of all.
        shuffled = [samples[index] for index in np.random.default_rng(config.seed).permutation(len(samples))]
        searches = [Job(name, (), 0).search for name in config.tables.rivals]
        encoded = {
            share: workshop.encode(shuffled[: max(1, round(share * len(samples)))])
            for share in {1.0, *(share for search in searches for share in search.shares)}
        }
        build = partial(Evaluator, workshop.elastic, repair=workshop.repair())
        needed = config.search.needs_divergence
        evaluators = {share: build(encoded=part, divergence=needed) for share, part in encoded.items()}
        diverging = build(encoded=encoded[1.0], divergence=True, cache_bytes=config.cache_bytes)
        settings = config.search
        self._reward = Reward(
            evaluations=settings.evaluations,
            levels=settings.sensitivity_levels,
            options=settings.tree_options(),
            reward=lambda evaluation: evaluation.worth(settings.reward),
            tie_breaker=lambda evaluation: evaluation.worth(settings.tie_breaker),
            evaluate=lambda allocation, share: evaluators[share].evaluate(Candidate(allocation)),
            workers=lambda: InProcess(evaluators[1.0]),
            with_divergence=lambda: InProcess(diverging),
        )

    def __call__(self, job: Job) -> list[Outcome]:
        """Runs a job: a function of the job, the config and the samples."""
        targets = {self._space.budget(target): target for target in job.targets}
        start = time.perf_counter()
        found = list(job.search.run(self._space, self._reward, list(targets), job.seed))
        seconds = time.perf_counter() - start
        return [
            Outcome(job.rival, targets[at.budget], job.seed, at.best.widths, at.worth[0], at.curve, seconds)
            for at in found
        ]
