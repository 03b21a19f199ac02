"""The models that are offered, as plain values: all that a request is answered from but the predictor itself."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lop.checkpoint.bits import Weight
from lop.checkpoint.recoveries import untrained
from lop.errors import LopError
from lop.methods.lop_predictor import METHOD as LOP_PREDICTOR
from lop.report.intervals import Interval, wilson
from lop.run.config import find_config, load_config
from lop.run.prediction import open_profile, predictor_for, predictor_identity, shape_of
from lop.run.results import read_search
from lop.run.run import Run, shipped_run
from lop.space.allocation import Space
from lop.space.latency import Profile
from lop.space.memory import Shape
from lop.space.size import ModelSize
from lop.storage.files import read_json
from lop.storage.fingerprint import fingerprint, fingerprint_file
from serve.exporting import companion_bytes, quantised_weights
from serve.settings import ModelSettings, ServiceSettings

log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Curve:
    """Measured accuracy by pruning ratio.

    Attributes:
        source: what was measured, in words.
        recovery: of the models that were measured.
        samples: how many questions.
        ratios: ascending.
        accuracies: at each ratio, with their 95% intervals.
    """

    source: str
    recovery: str
    samples: int
    ratios: tuple[float, ...]
    accuracies: tuple[Interval, ...]

    def at(self, ratio: float) -> Interval | None:
        """Interpolated linearly between the measured ratios; None outside them."""
        if not self.ratios[0] - 1e-9 <= ratio <= self.ratios[-1] + 1e-9:
            return None
        bounds = ([getattr(accuracy, name) for accuracy in self.accuracies] for name in ("value", "low", "high"))
        return Interval(*(float(np.interp(ratio, self.ratios, values)) for values in bounds))


@dataclass(frozen=True)
class ServedModel:
    """One model on offer.

    Attributes:
        name: as requests name it.
        space: its allocations.
        size: the dense model's numbers.
        source: the dense checkpoint's folder.
        fingerprints: of all that a checkpoint depends on beside what is asked for; they go into its id.
        recovery: what the run's config makes up for pruned neurons with; the default.
        companions: bytes of a checkpoint's files beside its tensors.
        weights: what the dense model comes to with weights of fewer bits, by those that are offered.
        curves: what is known of its accuracy, by recovery; empty if nothing has been measured.
        shape: the model's.
        profiles: by name, of the devices that a latency can be asked for.
    """

    name: str
    space: Space
    size: ModelSize
    source: Path
    fingerprints: Mapping[str, str]
    recovery: str
    companions: int
    weights: Mapping[int, Weight]
    curves: Mapping[str, Curve]
    shape: Shape
    profiles: Mapping[str, Profile]

    def curve(self, recovery: str) -> Curve | None:
        """What was measured with a recovery; else, without any."""
        return self.curves.get(recovery) or self.curves.get("none")


def open_run(entry: ModelSettings) -> Run:
    """The run behind an offered model.

    Raises:
        LopError: the config is missing or wrong, or there is no run and nothing ships.
    """
    if entry.config is not None:
        config = load_config(find_config(entry.config))
    elif entry.run is not None:
        config = load_config(entry.run / "config.yaml")
    else:
        raise LopError("a model of the service needs `run` (a folder) or `config` (of a model with a shipped run)")
    run = Run(config, entry.run) if entry.run else shipped_run(config)
    if run is None:
        raise LopError(f"nothing ships for model {config.model!r}: name the `run` folder of its search")
    return run


def load_catalogue(settings: ServiceSettings) -> dict[str, ServedModel]:
    """Opens and checks every model on offer.

    Raises:
        LopError: a run is incomplete, damaged or of another model.
    """
    return {name: _served(name, open_run(entry), entry.profiles) for name, entry in settings.models.items()}


def _served(name: str, run: Run, profiles: Mapping[str, Path]) -> ServedModel:
    predictor = predictor_for(run, run.config)
    _ = run.order  # An export needs the statistics: better missed now than then.
    return ServedModel(
        name,
        predictor.space,
        predictor.size,
        run.model_folder,
        fingerprints_of(run),
        untrained(run.config.recovery),
        companion_bytes(run),
        quantised_weights(run),
        measured_curves(run),
        shape_of(run),
        {device: open_profile(path, predictor) for device, path in profiles.items()},
    )


def fingerprints_of(run: Run) -> dict[str, str]:
    """What a checkpoint of the run depends on, beside what is asked for.

    Raises:
        LopError: a file is missing.
    """
    if not run.statistics_file.is_file():
        raise LopError(f"{run.statistics_file} is missing: run `lop calibrate`, `lop search` and `lop train` first")
    return {
        "model": run.model_fingerprint,
        "statistics": fingerprint_file(run.statistics_file),
        "importance": run.config.importance,
        "predictor": predictor_identity(run),
        "space": fingerprint(run.space.as_dict()),
        "arithmetic": run.arithmetic,  # Recovery computes with the model.
    }


def measured_curves(run: Run) -> dict[str, Curve]:
    """The predictor's accuracy on the test samples where it was compared; else the search's on the reward samples."""
    try:
        curves = _compared(run) or _searched(run)
    except LopError as error:
        log.warning("no expected accuracy for %s: %s", run.folder, error)
        return {}
    return {curve.recovery: curve for curve in curves}


def _compared(run: Run) -> list[Curve]:
    results = run.folder / "results.json"
    if not results.exists():
        return []
    data: dict[str, Any] = read_json(results)
    current = predictor_identity(run)
    if data["fingerprints"].get("predictor") != current or data["fingerprints"].get("model") != run.model_fingerprint:
        log.warning("%s was measured with another model or predictor", results)
        return []
    dense = next(average for average in data["averages"] if average["method"] == "dense")
    samples = sum(row["total"] for row in data["rows"] if row["method"] == "dense")
    measured: dict[str, dict[float, Interval]] = {}
    # The averages are without recovery; with each there are fewer targets.
    plain = ({**average, "recovery": "none"} for average in data["averages"])
    for row in (*plain, *data.get("recoveries", ())):
        if row["method"] == LOP_PREDICTOR.name:
            points = measured.setdefault(row["recovery"], {dense["target"]: Interval(**dense["accuracy"])})
            points[row["target"]] = Interval(**row["accuracy"])
    source = "the predictor's allocations on the test samples"
    return [Curve(source, recovery, samples, *_columns(points)) for recovery, points in measured.items()]


def _searched(run: Run) -> list[Curve]:
    if not run.search_file.exists():
        return []
    samples = len(run.samples.reward)
    points = {
        run.space.ratio_of(found.best.widths): wilson(
            round(dict(found.evaluations)[found.best].accuracy * samples), samples
        )
        for found in read_search(run)
    }
    source = "the search's best on its own reward samples (optimistic)"
    return [Curve(source, "none", samples, *_columns(points))]


def _columns(points: Mapping[float, Interval]) -> tuple[tuple[float, ...], tuple[Interval, ...]]:
    ratios = tuple(sorted(points))
    return ratios, tuple(points[ratio] for ratio in ratios)
