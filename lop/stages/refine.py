"""A search's answers, searched near by once more, refitted as they ship.

A tree scores allocations by a refit on what the dense model's layers see. What ships is refitted layer by layer, on
what the pruned and refitted layers before see, and ranks allocations otherwise. So a smaller tree goes on from each
answer, whose candidates are refitted on what the answer's own layers see (`lop.checkpoint.recovery.factors_near`): the
answer by that is what it ships as, and what is near to it nearly is. The finalists, the answer among them, are
confirmed in the same way.
"""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

from lop.run.compute import Compute
from lop.run.results import Refined
from lop.run.run import Run
from lop.run.settings import RefineSettings
from lop.search.confirmation import confirm
from lop.search.ledger import Ledger
from lop.search.loop import run_search
from lop.search.progress import SearchProgress
from lop.search.tree import SearchTree, TreeOptions
from lop.space.allocation import Allocation
from lop.storage.files import read_as, write_json
from lop.storage.fingerprint import fingerprint

log = logging.getLogger(__name__)


class Watch(Protocol):
    """Follows trees by target, inside a block."""

    def __call__(self, trees: Mapping[float, SearchTree]) -> AbstractContextManager[SearchProgress]:
        """What to tell of them."""


def refine(
    run: Run, compute: Compute, answers: Mapping[float, Allocation], settings: RefineSettings, watch: Watch
) -> dict[float, list[Refined]]:
    """What is found near each target's answer, round after round.

    Each round is kept in the run's `refinements`, its evaluations as they come: the same call goes on where it stopped.

    Raises:
        LopError: a ledger is damaged or of other samples, the model cannot be loaded, or workers cannot be had.
    """
    found: dict[float, list[Refined]] = {}
    for target, answer in answers.items():
        rounds = found.setdefault(target, [])
        for _ in range(settings.rounds):
            rounds.append(_round(run, compute, target, answer, settings, watch))
            if rounds[-1].best == answer:
                break
            answer = rounds[-1].best
    return found


def _round(
    run: Run, compute: Compute, target: float, near: Allocation, settings: RefineSettings, watch: Watch
) -> Refined:
    search, confirms = run.config.search, run.config.search.confirm
    assert confirms
    most = settings.evaluations
    options = replace(search.tree_options(), step=settings.step, evaluations=most, simulations=2 * most)
    name = _name(run, near, options, confirms.candidates)
    file = run.folder / "refinements" / f"{name}.json"
    if file.exists():
        return read_as(file, Refined.from_dict)
    log.info("search: near the answer at %.4g%%, refitted on what its own layers see", 100 * target)
    tree = SearchTree(
        run.space,
        [near],
        options,
        seed=(run.config.seed, run.space.cost(near.widths)),
        reward=lambda evaluation: evaluation.worth(search.reward),
        tie_breaker=lambda evaluation: evaluation.worth(search.tie_breaker),
    )
    made_from = {**run.ledger_fingerprints, "refitted near": fingerprint(near.widths)}
    with (
        Ledger(run.location / "refinements" / name, made_from) as ledger,
        compute.evaluators(run, near) as workers,
        watch({target: tree}) as watcher,
    ):
        run_search([tree], workers, ledger, watcher=watcher)
        (confirmed,) = confirm(
            {target: tree}, confirms.candidates, workers, ledger, watcher.tick, guards={target: [near]}
        ).values()
        watcher.finish(workers)
    refined = Refined(near, tree.confirmed(confirmed), tuple(tree.results.items()), tuple(confirmed.items()))
    write_json(file, refined.as_dict())
    run.keep(file)
    return refined


def _name(run: Run, near: Allocation, options: TreeOptions, finalists: int) -> str:
    """A fingerprint of all that a round depends on."""
    search = run.config.search
    rewards = search.reward, search.tie_breaker
    made_from = run.ledger_fingerprints, run.space.as_dict(), run.config.seed, vars(options), finalists, rewards
    return fingerprint([near.widths, *made_from])
