"""`lop demo`: the whole path, stage after stage; what is done already is not done again."""

import logging
from pathlib import Path
from typing import Any

from lop.checkpoint.export import verify
from lop.errors import LopError
from lop.predictor.training import check_targets
from lop.run.compute import Compute
from lop.run.prediction import open_predictor
from lop.run.run import Run
from lop.stages.calibrate import calibrate_stage
from lop.stages.compare import compare_stage
from lop.stages.prune import export_allocation
from lop.stages.search import search_stage
from lop.stages.train import train_stage
from lop.storage.location import Location

log = logging.getLogger(__name__)


def demo(run: Run, compute: Compute) -> Path:
    """Runs every stage that is not done yet, and returns the report's path.

    Raises:
        LopError: the folder holds a run of another model or other settings, or a damaged file; or the config's targets
            are too few to train on.
    """
    stages = (
        ("calibrate", lambda: calibrate_stage(run)),
        ("search", lambda: search_stage(run, compute)),
        ("train", lambda: train_stage(run, compute)),
        ("prune", lambda: _prune_all(run)),
        ("compare", lambda: compare_stage(run, compute)),
    )
    check_targets(run.config.search.targets.ratios)
    run.check_writable()
    for number, (name, stage) in enumerate(stages, start=1):
        log.info("%d/%d %s", number, len(stages), name)
        stage()
    return run.report_file


def _prune_all(run: Run) -> None:
    """One checkpoint for each target of the comparison, as the predictor allocates."""
    predictor = open_predictor(run, run.predictor_folder)
    for target in run.config.compare.targets:
        place = run.checkpoints / f"{target:.3f}"
        allocation = predictor.allocate(run.space.budget(target))
        if _holds(place, widths=list(allocation.widths), recovery=run.config.recovery):
            log.info("prune: %s is there already", place)
            continue
        place.remove()
        export_allocation(run, allocation, place, target=target)


def _holds(place: Location, **expected: Any) -> bool:
    """Whether the folder holds an undamaged checkpoint whose manifest says so."""
    try:
        manifest = verify(place)
        return all(manifest.get(name) == value for name, value in expected.items())
    except LopError:
        return False
