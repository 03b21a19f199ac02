"""A few evaluations on a calibrated model, where the general predictor wants them most."""

import logging
from collections.abc import Sequence

from tqdm import tqdm

from lop.errors import LopError
from lop.predictor.general import General, load_general
from lop.predictor.probing import Probe, alone, probe, probe_for
from lop.run.compute import Compute
from lop.run.config import save_config
from lop.run.probes import Probed, load_probes, save_probes
from lop.run.run import Run
from lop.search.evaluation import Evaluation
from lop.search.ledger import Ledger
from lop.search.loop import evaluate_recorded
from lop.search.racing import Candidate
from lop.space.allocation import Allocation, of_ffns
from lop.stages.calibrate import features_stage
from lop.stages.timing import timed

log = logging.getLogger(__name__)


def probe_stage(
    run: Run,
    compute: Compute,
    count: int,
    ratio: float | None = None,
    *,
    general: General | None = None,
    progress: bool = True,
) -> Probed:
    """Spends `count` evaluations in all, those of earlier calls included, and keeps what they say.

    All of them are in the run's ledger: none is made twice, and a search goes on from them.

    Args:
        ratio: the target that they are for: some of them measure layers alone, the others are a small search. Without
            one, all of them measure layers alone, for whatever target.
        general: what expects something of the model before; what ships if None.

    Raises:
        LopError: the count is below 1, the model was not calibrated, the target is none of the model's, or the search's
            evaluations do not measure divergence.
    """
    if count < 1:
        raise LopError(f"--budget {count}: at least 1 evaluation")
    if not run.config.search.needs_divergence:
        raise LopError("probes are divergences, which the search does not measure: --set search.reward=divergence")
    budget = None if ratio is None else run.space.budget(ratio)
    features, general, before = features_stage(run), general or load_general(), load_probes(run)
    run.check_writable()
    made = {alone(run.space, known.layer, known.share) for known in before.probes}
    with (
        timed(run, "probe"),
        Ledger(run.ledger, run.ledger_fingerprints) as ledger,
        compute.evaluators(run) as workers,
        tqdm(total=count, desc="probe", unit="evaluation", disable=not progress) as bar,
    ):
        save_config(run.settled, run.folder / "config.yaml")

        def evaluate(allocation: Allocation, *, itemised: bool = True) -> Evaluation:
            found = evaluate_recorded([Candidate(allocation, itemised=itemised)], workers, ledger)[allocation]
            made.add(allocation)
            bar.update()
            return found

        def measure(allocation: Allocation) -> float:
            return -evaluate(allocation, itemised=False).worth("divergence")

        probes, best = list(before.probes), dict(before.best)
        curves = general.curves(features)
        if budget is None:
            probes = probe(curves, run.space, count, measure)
        else:

            def allocate(known: Sequence[Probe], budget: int = budget) -> Allocation:
                return of_ffns(run.space, budget, general.answering(features, known))

            step, seed = run.config.search.step, run.config.seed
            probes, best[budget] = probe_for(
                run.space, curves, budget, count, allocate, measure, evaluate, size=step, seed=seed, made=probes
            )
    found = Probed(tuple(probes), best, len(made))
    save_probes(run, found)
    log.info("probe: %d layers alone, %d evaluations in all", len(probes), found.evaluations)
    return found
