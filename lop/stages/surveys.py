"""What some methods read beside the statistics, from the calibration samples."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lop.methods.registry import METHODS
from lop.model.statistics import load_survey, save_survey
from lop.run.building import Materials, Workshop
from lop.run.compute import Compute
from lop.run.run import Run
from lop.run.surveys import SURVEYS, Arrays, Piece, surveys_of
from lop.storage.fingerprint import fingerprint

log = logging.getLogger(__name__)


def survey_stage(run: Run, compute: Compute, methods: Iterable[str], *, progress: bool = True) -> None:
    """Makes what methods read beside the statistics, unless it is there; an interrupted survey goes on.

    Raises:
        LopError: what is there is of another model or other samples, or damaged.
    """
    needs = {need for name in methods for need in METHODS[name].needs}
    make_surveys(run, compute, surveys_of(needs), progress=progress)


def make_surveys(run: Run, compute: Compute, kinds: Iterable[str], *, progress: bool = True) -> None:
    """Makes the surveys of some kinds; see `survey_stage`."""
    for kind in kinds:
        if run.survey_file(kind).exists():
            run.surveyed([kind])
        else:
            _make(run, compute, kind, progress=progress)


def _make(run: Run, compute: Compute, kind: str, *, progress: bool) -> None:
    samples = tuple(run.samples.calibration)
    files = {piece: _piece_file(run, kind, piece) for piece in SURVEYS[kind].pieces(run.size, len(samples))}
    run.check_writable()
    waiting = [piece for piece, file in files.items() if not file.exists()]
    neurons = np.tile(np.arange(run.space.neurons), (run.space.layers, 1))
    materials = Materials(run.settled, neurons, np.zeros(neurons.shape), samples)
    results = compute.map(partial(SurveyWorker, kind, materials), waiting, run.config)
    for piece, done in tqdm(results, desc=kind, total=len(waiting), unit="piece", disable=not progress):
        save_survey(files[piece], done.arrays, run.calibration_fingerprints, seconds=done.seconds)
        run.keep(files[piece])
    found = [load_survey(file, run.calibration_fingerprints) for file in files.values()]
    names = found[0][0]
    merged = {name: SURVEYS[kind].merge([arrays[name] for arrays, _ in found]) for name in names}
    seconds = sum(spent for _, spent in found)
    save_survey(run.survey_file(kind), merged, run.calibration_fingerprints, seconds=seconds)
    run.keep(run.survey_file(kind))
    for file in files.values():
        file.unlink()


def _piece_file(run: Run, kind: str, piece: Piece) -> Path:
    made_from = fingerprint(run.calibration_fingerprints)
    return run.folder / "surveys" / f"{kind}-{piece[0]}-{piece[1]}-{made_from}.safetensors"


@dataclass(frozen=True)
class Done:
    """A piece of a survey, and the seconds that it took."""

    arrays: Arrays
    seconds: float


class SurveyWorker:
    """Holds the model and the samples, and makes pieces of a survey.

    Args:
        materials: in the dense model's own order of neurons.
    """

    def __init__(self, kind: str, materials: Materials) -> None:
        start = time.perf_counter()
        self._surveyor = SURVEYS[kind].open(Workshop(materials), materials.calibration)
        self._spent = time.perf_counter() - start  # Goes to the first piece.

    def __call__(self, piece: Piece) -> Done:
        """Makes one piece."""
        start = time.perf_counter()
        arrays = self._surveyor(piece)
        spent, self._spent = self._spent, 0.0
        return Done(arrays, spent + time.perf_counter() - start)
