"""Which predictor answers for a model: a run's own, or the one that ships. Like the answer itself, without torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lop.checkpoint.footprint import Footprint
from lop.checkpoint.formats import Format
from lop.checkpoint.recoveries import Recovery
from lop.errors import LopError
from lop.model.shape import read_shape
from lop.predictor.predictor import Predictor, load_predictor
from lop.run.config import Config
from lop.run.run import Run, shipped_run
from lop.space.allocation import Allocation, Space
from lop.space.latency import Profile, parse_profile
from lop.space.memory import Shape
from lop.space.size import Target
from lop.storage.files import read_json
from lop.storage.fingerprint import check_fingerprints


def predictor_for(run: Run | None, config: Config) -> Predictor:
    """The run's predictor, or the one that ships for the model.

    Raises:
        LopError: there is none, it is damaged, or it was made with another model.
    """
    owner = run or what_ships(config)
    return open_predictor(owner, owner.predictor_folder)


def answer(run: Run | None, config: Config, target: Target, format: Format) -> dict[str, Any]:
    """What a checkpoint of the target would be, as plain JSON values; see `Footprint.describe`.

    Raises:
        LopError: the target cannot be met, or the predictor is missing or of another model.
    """
    predictor, footprint, allocation = allocate(run, config, target, format)
    return footprint.describe(allocation, predictor.space, target)


def allocate(
    run: Run | None, config: Config, target: Target, format: Format
) -> tuple[Predictor, Footprint, Allocation]:
    """The allocation for a target, with what it was found by.

    Raises:
        LopError: as `answer`.
    """
    owner = run or what_ships(config)
    predictor = open_predictor(owner, owner.predictor_folder)
    footprint = footprint_for(owner, predictor, format, config.recovery)
    if target.profile is not None:
        check_profile(target.profile, predictor)
    return predictor, footprint, footprint.allocate(target, predictor.space, predictor.allocate)


def footprint_for(run: Run, predictor: Predictor, format: Format, recovery: Recovery) -> Footprint:
    """What checkpoints of the run's model take.

    Raises:
        LopError: the model is missing, or the format has no place for the recovery.
    """
    return Footprint(predictor.size, format, recovery, shape_of(run, predictor), run.model_folder)


def shape_of(run: Run, predictor: Predictor) -> Shape:
    """The shape of the run's model."""
    size = predictor.size
    return read_shape(run.model_folder, size.neuron_bytes // size.neuron_parameters)


def open_profile(path: Path, predictor: Predictor) -> Profile:
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


def check_profile(profile: Profile, predictor: Predictor) -> None:
    """Looks whether a profile is of the predictor's model.

    Raises:
        LopError: it is of another one.
    """
    model = predictor.fingerprints["model"]
    if profile.model != model:
        raise LopError(
            f"the device profile is of another model ({profile.model}, here it is {model}): run `lop profile`"
        )


def open_predictor(run: Run, folder: Path) -> Predictor:
    """A predictor that the run has trained, with the widths that the run's config allows now.

    Raises:
        LopError: it is missing or damaged, was made with another model, or its model has no such widths.
    """
    predictor = load_predictor(folder)
    check_fingerprints(str(folder), predictor.fingerprints, {"model": run.model_fingerprint})
    config, trained = run.config, predictor.space
    bound = trained.max_width_ratio if config.max_width_ratio is None else config.max_width_ratio
    space = Space(trained.layers, trained.neurons, config.granularity, config.max_ratio, bound)
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
