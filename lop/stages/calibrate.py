"""From the calibration samples to the statistics of every neuron."""

import logging

import torch

from lop.model.adapter import load_model
from lop.model.encoding import encode
from lop.model.features import measure_features
from lop.model.find import EMBEDDED
from lop.model.importance import SURVEYS_OF
from lop.model.statistics import calibrate
from lop.run.building import Materials, Workshop
from lop.run.config import Config, save_config
from lop.run.features import features_file, load_features, save_features
from lop.run.run import Run
from lop.space.features import Features
from lop.stages.local import Local
from lop.stages.surveys import make_surveys
from lop.stages.timing import timed

log = logging.getLogger(__name__)


def calibrate_stage(run: Run, *, progress: bool = True) -> None:
    """Writes the run's statistics, and the survey that the config's importance reads, unless they are there already.

    Raises:
        LopError: the run's statistics were made with another model or other samples.
    """
    _calibrate(run, progress=progress)
    make_surveys(run, Local(), SURVEYS_OF.get(run.config.importance, ()), progress=progress)


def _calibrate(run: Run, *, progress: bool) -> None:
    attention = run.space.attention is not None
    if run.statistics_file.exists():
        # Those of before attention was open are made anew.
        if not attention or run.statistics.groups is not None:
            _ = run.statistics
            log.info("calibrate: %s is there already", run.statistics_file)
            return
        del run.__dict__["statistics"]
    # What does not fit is told before the model is loaded.
    _, samples = run.space, run.samples.calibration
    run.check_writable()
    warn_of_samples(run.config)
    with timed(run, "calibrate"):
        torch.set_num_threads(run.config.threads)
        log.info("calibrate: loading the model, then %d samples go through its tower", len(run.samples.calibration))
        model = load_model(run.model_folder, device=run.config.device, dtype=run.config.dtype)
        encoded = encode(model, samples, batch_tokens=run.config.batch_tokens, images=run.config.images)
        statistics = calibrate(model, encoded, attention=attention, progress=progress)
        statistics.save(run.statistics_file, run.calibration_fingerprints)


def features_stage(run: Run) -> Features:
    """The features of a calibrated run's model, which are measured unless they are there.

    Raises:
        LopError: the run has no statistics, or what is there is of another model, other samples or another importance.
    """
    if not features_file(run).exists():
        run.check_writable()
        with timed(run, "features"):
            workshop = Workshop(Materials.of(run))
            log.info("features: %d samples, forward and back", len(run.samples.calibration))
            save_features(run, measure_features(workshop.elastic.backbone, workshop.encode(run.samples.calibration)))
    if not (own := run.folder / "config.yaml").exists():  # By it the run is answered for from now on.
        save_config(run.settled, own)
    return load_features(run)


def warn_of_samples(config: Config) -> None:
    """Says so where the embedded model's samples stand in for real ones."""
    if config.samples == EMBEDDED != config.model:
        log.warning(
            "samples %r are small pictures with simple questions, made for the embedded model: good for a try; "
            "for real use name a folder with your own (samples: README, 'Your own samples')",
            EMBEDDED,
        )
