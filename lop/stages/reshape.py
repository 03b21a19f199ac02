"""From a ratio to the checkpoint of a model from which a method has removed whole layers."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lop import __version__
from lop.checkpoint.depth import export_layers
from lop.checkpoint.recoveries import RECOVERIES
from lop.errors import LopError
from lop.methods.registry import RESHAPINGS
from lop.run.building import Materials, Workshop
from lop.run.config import Config
from lop.run.run import Run
from lop.storage.destination import check_new
from lop.storage.location import Location


def reshape_stage(config: Config, method: str, target: float, out: str | Path | Location) -> dict[str, Any]:
    """Writes what a method makes of the config's model; it appears whole or not at all.

    Args:
        method: a key of `RESHAPINGS`.
        target: its parameters are as many less, at least, as if this share of the FFN neurons (with attention open: of
            the parameters of both) were.
        out: a new folder: a local path, a URI that pyarrow knows, such as `s3://bucket/folder`, or a location.

    Returns:
        The checkpoint's manifest.

    Raises:
        LopError: the method's models have no checkpoint, or not the config's recovery; the target is out of its reach;
            or `out` is there already.
        OSError: the disk is full or read-only. After any error nothing is left behind.
    """
    reshaping, recovery, place = RESHAPINGS[method], config.recovery, Location.parse(out)
    if reshaping.not_exported:
        others = ", ".join(name for name, each in RESHAPINGS.items() if not each.not_exported)
        raise LopError(f"{method} has no checkpoint: {reshaping.not_exported}; {others} have one")
    refits = RECOVERIES[recovery].refits
    if RECOVERIES[recovery].adds_bias or RECOVERIES[recovery].trains:
        raise LopError(f"recovery {recovery!r} is not for removed layers: choose 'none' or 'refit'")
    check_new(place)
    with TemporaryDirectory(prefix="lop-reshape-") as folder:
        run = Run(config, Path(folder))
        asked = run.removed_parameters(target)
        neurons = np.tile(np.arange(run.space.neurons), (run.space.layers, 1))
        samples = tuple(run.samples.calibration)
        workshop = Workshop(Materials(run.settled, neurons, np.zeros(neurons.shape), samples))
        dense = workshop.elastic.backbone
        found = reshaping.reshape(dense, workshop.encode(samples), asked, refits)
        assert found.places is not None
        about = {
            "version": __version__,
            "source": config.model,
            "target": target,
            "method": method,
            "recovery": recovery if reshaping.refits else "none",
            "fingerprints": run.calibration_fingerprints,
        }
        return export_layers(run.model_folder, place, dense, found.backbone, found.places, about=about)
