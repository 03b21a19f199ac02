"""Which predictor answers for a model: a run's own, or the one that ships. Like the answer itself, without torch."""

from dataclasses import replace

from lop.config import Config
from lop.errors import LopError
from lop.fingerprint import check_fingerprints
from lop.predictors import Predictor, load_predictor
from lop.run import Run, shipped_run


def predictor_for(run: Run | None, config: Config) -> Predictor:
    """The run's predictor, or the one that ships for the model.

    Raises:
        LopError: there is none, it is damaged, or it was made with another model.
    """
    owner = run or what_ships(config)
    predictor = load_predictor(owner.predictor_folder)
    check_fingerprints(str(owner.predictor_folder), predictor.fingerprints, {"model": owner.model_fingerprint})
    if config.max_width_ratio is not None:
        predictor = replace(predictor, space=replace(predictor.space, max_width_ratio=config.max_width_ratio))
    return predictor


def what_ships(config: Config) -> Run:
    """The run that comes with the package for the config's model.

    Raises:
        LopError: none does.
    """
    run = shipped_run(config)
    if run is None:
        raise LopError(f"nothing ships for model {config.model!r}: name the --run folder of its search")
    return run
