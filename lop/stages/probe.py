"""A few evaluations on a calibrated model, where the general predictor wants them most."""

import logging
from collections.abc import Sequence

from tqdm import tqdm

from lop.errors import LopError
from lop.predictor.general import load_general
from lop.predictor.probing import Probe, alone, probe, small_tree, start_for, surest
from lop.run.compute import Compute
from lop.run.config import save_config
from lop.run.probes import Probed, load_probes, save_probes
from lop.run.run import Run
from lop.search.ledger import Ledger
from lop.search.loop import Workers, evaluate_recorded, run_search
from lop.search.racing import Candidate
from lop.search.tree import SearchTree
from lop.space.allocation import Allocation, of_ffns
from lop.stages.calibrate import features_stage
from lop.stages.timing import timed

log = logging.getLogger(__name__)


class _Shown:
    """Moves the bar as a tree grows."""

    def __init__(self, bar: tqdm) -> None:
        self._bar, self._before = bar, bar.n

    def advanced(self, tree: SearchTree) -> None:
        """So many allocations are known."""
        self._bar.update(self._before + len(tree.results) - self._bar.n)

    def prepared(self, step: str, done: int, planned: int) -> None:
        """Nothing comes before the tree."""

    def tick(self, workers: Workers) -> None:
        """The bar shows what is committed."""


def probe_stage(run: Run, compute: Compute, count: int, ratio: float | None = None, *, progress: bool = True) -> Probed:
    """Spends `count` evaluations in all, those of earlier calls included, and keeps what they say.

    All of them are in the run's ledger: none is made twice, and a search goes on from them.

    Args:
        ratio: the target that they are for: some of them measure layers alone, the others are a small search. Without
            one, all of them measure layers alone, for whatever target.

    Raises:
        LopError: the count is below 1, the model was not calibrated, the target is none of the model's, or the search's
            evaluations do not measure divergence.
    """
    if count < 1:
        raise LopError(f"--budget {count}: at least 1 evaluation")
    if not run.config.search.needs_divergence:
        raise LopError("probes are divergences, which the search does not measure: --set search.reward=divergence")
    budget = None if ratio is None else run.space.budget(ratio)
    features, general, before = features_stage(run), load_general(), load_probes(run)
    run.check_writable()
    made = {alone(run.space, known.layer, known.share) for known in before.probes}
    with (
        timed(run, "probe"),
        Ledger(run.ledger, run.ledger_fingerprints) as ledger,
        compute.evaluators(run) as workers,
        tqdm(total=count, desc="probe", unit="evaluation", disable=not progress) as bar,
    ):
        save_config(run.settled, run.folder / "config.yaml")

        def measure(allocation: Allocation) -> float:
            # A tree asks again for what it may start from, and then for what each sample is worth.
            candidate = Candidate(allocation, itemised=allocation.budget == budget)
            found = evaluate_recorded([candidate], workers, ledger)
            made.add(allocation)
            bar.update()
            return -found[allocation].worth("divergence")

        probes, best = list(before.probes), dict(before.best)
        if budget is None:
            probes = probe(general.curves(features), run.space, count, measure)
        else:

            def allocate(known: Sequence[Probe], budget: int = budget) -> Allocation:
                return of_ffns(run.space, budget, general.answering(features, known))

            start = start_for(general.curves(features), run.space, count, allocate, measure, probes)
            probes += start.probes
            tree = small_tree(
                run.space,
                start.allocation,
                budget,
                start.left,
                run.config.search.tree_options(),
                seed=run.config.seed,
                reward=lambda evaluation: evaluation.worth(run.config.search.reward),
            )
            run_search([tree], workers, ledger, watcher=_Shown(bar))
            made.update(tree.results)
            best[budget] = surest(tree)
    found = Probed(tuple(probes), best, len(made))
    save_probes(run, found)
    log.info("probe: %d layers alone, %d evaluations in all", len(probes), found.evaluations)
    return found
