"""A few evaluations on a calibrated model, where the general predictor wants them most."""

import logging

from tqdm import tqdm

from lop.errors import LopError
from lop.predictor.general import load_general
from lop.predictor.probing import best_of_few, probe
from lop.run.compute import Compute
from lop.run.config import save_config
from lop.run.probes import Probed, load_probes, save_probes
from lop.run.run import Run
from lop.search.ledger import Ledger
from lop.search.loop import evaluate_recorded
from lop.search.racing import Candidate
from lop.space.allocation import Allocation
from lop.stages.calibrate import features_stage
from lop.stages.timing import timed

log = logging.getLogger(__name__)


def probe_stage(run: Run, compute: Compute, count: int, ratio: float | None = None, *, progress: bool = True) -> Probed:
    """Spends `count` evaluations in all, those of earlier calls included, and keeps what they say.

    All of them are in the run's ledger: none is made twice, and a search goes on from them.

    Args:
        ratio: the target that they are for; a third of them then compares allocations of it. Without one, all of them
            measure layers alone, for whatever target.

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
    made: set[Allocation] = set()
    with (
        timed(run, "probe"),
        Ledger(run.ledger, run.ledger_fingerprints) as ledger,
        compute.evaluators(run) as workers,
        tqdm(total=count, desc="probe", unit="evaluation", disable=not progress) as bar,
    ):
        save_config(run.settled, run.folder / "config.yaml")

        def measure(allocation: Allocation) -> float:
            found = evaluate_recorded([Candidate(allocation)], workers, ledger)
            made.add(allocation)
            bar.update()
            return -found[allocation].worth("divergence")

        curves = general.curves(features)
        if budget is None:
            probes, best = probe(curves, run.space, count, measure), dict(before.best)
        else:
            chosen, probes = best_of_few(curves, run.space, budget, general.rule, count, measure)
            best = {**before.best, budget: chosen}
    found = Probed(tuple(probes), best, len(made))
    save_probes(run, found)
    log.info("probe: %d layers alone, %d evaluations in all", len(probes), found.evaluations)
    return found
