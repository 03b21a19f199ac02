"""The features of a run's model, kept beside its statistics. Without torch."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lop.errors import LopError
from lop.run.run import Run
from lop.space.features import CURVES, PRUNED, SCALARS, Features
from lop.storage.files import atomic_file, disk_errors
from lop.storage.fingerprint import check_fingerprints, fingerprint

_ARRAYS = ("curves", "scalars")
# What the numbers mean: files of another meaning are made again.
_MEANING = fingerprint([PRUNED, CURVES, SCALARS])


def features_file(run: Run) -> Path:
    """Where a run's features are."""
    return run.folder / "features.safetensors"


def save_features(run: Run, features: Features) -> None:
    """Writes what was measured of the run's model."""
    path = features_file(run)
    arrays = {name: np.ascontiguousarray(getattr(features, name)) for name in _ARRAYS}
    with atomic_file(path) as temporary, disk_errors(path):
        save_file(arrays, temporary, metadata=_made_from(run))
    run.keep(path)


def load_features(run: Run) -> Features:
    """What `lop calibrate` measured.

    Raises:
        LopError: it is missing or damaged, or belongs to another model, other samples or another importance.
    """
    path = features_file(run)
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
            metadata = dict(file.metadata() or {})
    except FileNotFoundError:
        raise LopError(f"{path} is missing: run `lop calibrate`, which measures it") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise LopError(f"{path} is damaged: {error}") from None
    check_fingerprints(str(path), metadata, _made_from(run))
    return Features(**arrays)


def _made_from(run: Run) -> dict[str, str]:
    return {**run.calibration_fingerprints, "importance": run.config.importance, "set of features": _MEANING}
