"""`lop measure`: how far pruned and quantised models are from the dense one, for a size in bytes to choose by."""

from collections.abc import Mapping, Sequence
from operator import itemgetter

from tqdm import tqdm

from lop.checkpoint.bits import is_too_narrow
from lop.checkpoint.compensation import quantised_elastic
from lop.checkpoint.packing import stored_dtype
from lop.checkpoint.recoveries import untrained
from lop.model.rounding import Rounding, check_library
from lop.run.building import Materials, Workshop
from lop.run.choice import footprint_of, packing_of
from lop.run.compute import Compute, on_worker
from lop.run.prediction import predictor_for
from lop.run.qualities import Qualities, Quality, quality_fingerprints, read_qualities
from lop.run.run import Run
from lop.search.evaluator import Evaluator
from lop.stages.timing import timed
from lop.storage.files import read_as, write_json


def measure_stage(run: Run, compute: Compute) -> Qualities:
    """Measures the KL to the dense model of the predictor's allocations at the config's ratios and bits.

    Each is made as `lop prune` would make it, but for training, scored on the reward samples, and kept at once: the
    same command goes on where it was stopped.

    Raises:
        LopError: there is no predictor, the granularity leaves no group, or the library that quantises is not there.
    """
    check_library()
    run.check_writable()
    predictor_for(run, run.config)
    with timed(run, "measure"):
        qualities = on_worker(measure, run, compute)
    _write(run, qualities)
    return qualities


def measure(run: Run) -> Qualities:
    """What `measure_stage` measures, but for what is there already."""
    config, settings = run.config, run.config.measure
    predictor, recovery = predictor_for(run, config), untrained(config.recovery)
    wanted = [(ratio, bits) for bits in settings.bits for ratio in settings.ratios]
    found = _there(run)
    left = [pair for pair in wanted if pair not in found]
    if left:
        workshop = Workshop(Materials.of(run))
        encoded = workshop.encode(run.samples.reward)
        evaluator = Evaluator(workshop.elastic, encoded, divergence=True)
        evaluator.remember()
        calibration = workshop.encode(run.samples.calibration)
    for ratio, bits in tqdm(left, desc="measure", unit="pair", disable=not left):
        packing = packing_of(run, bits)
        allocation = predictor.allocate(predictor.space.budget(ratio))
        if packing is not None and is_too_narrow(bits, allocation.widths[: run.space.layers]):
            continue  # Which nobody can have.
        with quantised_elastic(
            workshop.elastic,
            allocation,
            recovery,
            None if packing is None else Rounding(bits, packing.group),
            means=run.statistics.mean,
            calibration=calibration,
            dtype=stored_dtype(run.model_folder),
        ):
            divergence = float(evaluator.now().divergence.mean())
        size = footprint_of(run, "hf", recovery, bits).bytes(allocation.widths)
        found[ratio, bits] = Quality(ratio, bits, size, divergence)
        _write(run, _qualities(run, found, wanted))
    return _qualities(run, found, wanted)


def _qualities(run: Run, found: Mapping[tuple[float, int], Quality], wanted: Sequence[tuple[float, int]]) -> Qualities:
    measured = tuple(found[pair] for pair in wanted if pair in found)
    return Qualities(untrained(run.config.recovery), len(run.samples.reward), measured)


def _there(run: Run) -> dict[tuple[float, int], Quality]:
    """What was measured already with the same model, samples, predictor and recovery."""
    if not run.qualities_file.exists():
        return {}
    if read_as(run.qualities_file, itemgetter("fingerprints")) != quality_fingerprints(run):
        return {}
    known = read_qualities(run)
    if known is None or known.recovery != untrained(run.config.recovery):
        return {}
    return {(quality.ratio, quality.bits): quality for quality in known.measured}


def _write(run: Run, qualities: Qualities) -> None:
    write_json(run.qualities_file, {"fingerprints": quality_fingerprints(run), "qualities": qualities.as_dict()})
    run.keep(run.qualities_file)
