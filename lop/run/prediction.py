"""Which predictor answers for a model: a run's own, or the one that ships. Without torch."""

from dataclasses import replace
from pathlib import Path

from lop.errors import LopError
from lop.model.shape import read_shape
from lop.predictor.general import SHIPPED, load_general
from lop.predictor.predictor import Predictor, load_predictor
from lop.predictor.unsearched import Answering, Unsearched
from lop.run.config import Config
from lop.run.features import features_file, load_features
from lop.run.probes import load_probes, probes_file
from lop.run.run import Run, shipped_run
from lop.space.allocation import ATTENTION, PARTS
from lop.space.latency import Profile, parse_profile
from lop.space.memory import Shape
from lop.storage.files import read_json
from lop.storage.fingerprint import check_fingerprints, fingerprint, fingerprint_file


def predictor_for(run: Run | None, config: Config) -> Answering:
    """The run's predictor, or the one that ships for the model; where none was trained, the general one.

    Raises:
        LopError: there is none and the model was not calibrated, or something is damaged or made with another model.
    """
    owner = run or what_ships(config)
    if owner.predictor_folder.exists():
        return open_predictor(owner, owner.predictor_folder)
    if features_file(owner).exists():
        return unsearched(owner)
    raise LopError(
        f"{owner.predictor_folder} is missing: run `lop train` first, after a search, "
        "or `lop calibrate`, after which the predictor for all models answers"
    )


def unsearched(run: Run) -> Unsearched:
    """What the general predictor expects of a calibrated run's model, given the probes that were made.

    Raises:
        LopError: the run was not calibrated, or what is there is damaged or of another model.
    """
    general, features = load_general(), load_features(run)
    if features.layers != run.space.layers:
        raise LopError(f"{features_file(run)} is damaged: it has {features.layers} layers, not {run.space.layers}")
    known = load_probes(run)
    return Unsearched(
        general.answering(features, known.probes),
        run.space,
        run.size,
        run.calibration_fingerprints,
        known.evaluations,
        known.best,
    )


def predictor_identity(run: Run) -> str:
    """A fingerprint of what answers for a run: its predictor's, or of all that the general one answers from.

    Raises:
        LopError: neither is there.
    """
    own = run.predictor_folder / "predictor.json"
    if own.is_file():
        return fingerprint_file(own)
    if not features_file(run).is_file():
        raise LopError(
            f"{own} is missing: run `lop calibrate`, `lop search` and `lop train` first; "
            "`lop calibrate` alone is enough for the predictor for all models"
        )
    return general_identity(run)


def general_identity(run: Run) -> str:
    """A fingerprint of all that the general predictor answers from for a run that was calibrated."""
    paths = (features_file(run), probes_file(run), SHIPPED)
    return fingerprint([fingerprint_file(path) for path in paths if path.is_file()])


def shape_of(run: Run) -> Shape:
    """The shape of the run's model."""
    size = run.size
    return read_shape(run.model_folder, size.neuron_bytes // size.neuron_parameters)


def open_profile(path: Path, predictor: Answering) -> Profile:
    """A device's profile for the predictor's model.

    Raises:
        LopError: it is missing, damaged or of another model.
    """
    profile = read_profile(path)
    check_profile(profile, predictor)
    return profile


def read_profile(path: Path) -> Profile:
    """What `lop profile` wrote, of whatever model.

    Raises:
        LopError: it is missing, or no profile.
    """
    data = read_json(path)
    try:
        return parse_profile(data)
    except LopError as error:
        raise LopError(f"{path}: {error}") from None


def check_profile(profile: Profile, predictor: Answering) -> None:
    """Looks whether a profile is of the predictor's model, and times all that is pruned of it.

    Raises:
        LopError: it is of another one, or times FFNs alone.
    """
    model = predictor.fingerprints["model"]
    if profile.model != model:
        raise LopError(
            f"the device profile is of another model ({profile.model}, here it is {model}): run `lop profile`"
        )
    attention = predictor.space.attention
    if attention and any(times.groups[-1:] != (attention.groups,) for times in profile.phases.values()):
        raise LopError(
            "the device profile times FFNs alone, and here attention is pruned, too: run `lop profile` with "
            f"--set 'parts=[{', '.join(PARTS)}]'"
        )


def open_predictor(run: Run, folder: Path) -> Predictor:
    """A predictor that the run has trained, with the widths that the run's config allows now.

    Raises:
        LopError: it is missing or damaged, was made with another model or for other parts, or its model has no such
            widths.
    """
    predictor = load_predictor(folder)
    check_fingerprints(str(folder), predictor.fingerprints, {"model": run.model_fingerprint})
    config, trained = run.config, predictor.space
    if (trained.attention is None) != (ATTENTION not in config.parts):
        parts = " and ".join(part.name for part in trained.parts)
        raise LopError(f"{folder} predicts {parts}, and the config has parts {' and '.join(config.parts)}: train again")
    bound = trained.max_width_ratio if config.max_width_ratio is None else config.max_width_ratio
    space = replace(trained, granularity=config.granularity, max_ratio=config.max_ratio, max_width_ratio=bound)
    return replace(predictor, space=space)


def what_ships(config: Config) -> Run:
    """The run that comes with the package for the config's model.

    Raises:
        LopError: none does.
    """
    run = shipped_run(config)
    if run is None:
        raise LopError(f"nothing ships for model {config.model!r}: name the --run folder of its search")
    return run
