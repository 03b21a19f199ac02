"""The settings of a run: YAML files from `configs/`, validated on load, with `--set key=value` on top."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from lop.checkpoint.recoveries import untrained
from lop.errors import LopError
from lop.model.find import EMBEDDED, SHIPPED, settled
from lop.model.image_settings import ImageSettings
from lop.run.settings import (
    BEFORE,
    CompareSettings,
    DistilSettings,
    Importance,
    MeasureSettings,
    Parts,
    Positive,
    Ratio,
    Recovery,
    SearchSettings,
    Settings,
    TablesSettings,
    TrainSettings,
)
from lop.space.allocation import FFN
from lop.storage.files import atomic_file

# Settings that no one writes by hand all together, and every run's own config has.
_ALWAYS_SAVED = ("seed", "recovery", "device", "dtype", "threads", "evaluation_seconds", "train", "compare", "tables")

# What pydantic says in words of its own.
_WORDS = {"too_short": "it is empty: name one at least", "extra_forbidden": "there is no such setting"}


class Config(Settings):
    """All settings of a run.

    `threads` are torch's on a CPU: sums come out alike on every machine and in every worker only if it is the same.
    `workers` is the most that the search asks the cluster for; an evaluation that takes more than `evaluation_seconds`
    is tried on another one. Each worker may spend `cache_bytes` on the dense model's states
    (`lop.search.evaluator.Evaluator`) and `refit_bytes` on weights refitted for scoring (`lop.model.repair`).
    `compile` has the FFNs' activations fused by torch.compile.
    `parts` are what may shrink: FFNs alone, or attention, too, in groups (a key/value head with the query heads that
    share it); ratios are then shares of the parameters of both. `min_width: 0` lets an FFN or attention go altogether.
    """

    model: str
    samples: str = "tiny"
    seed: Annotated[int, Field(ge=0)] = 0
    granularity: Positive = 128
    max_ratio: Ratio = 0.95
    max_width_ratio: Annotated[float, Field(ge=1)] | None = None
    parts: Parts = (FFN,)
    min_width: Literal[0] | None = None
    importance: Importance = "activation"
    recovery: Recovery = "refit"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_tokens: Positive = 8192
    images: ImageSettings = ImageSettings()
    cache_bytes: Annotated[int, Field(ge=0)] = 256 << 20
    refit_bytes: Annotated[int, Field(ge=0)] = 1 << 30
    compile: bool = False
    workers: Annotated[int, Field(ge=0)] = 0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    evaluation_seconds: Annotated[float, Field(gt=0)] = 1800
    search: SearchSettings
    train: TrainSettings = TrainSettings()
    compare: CompareSettings = CompareSettings()
    tables: TablesSettings = TablesSettings()
    measure: MeasureSettings = MeasureSettings()
    distil: DistilSettings = DistilSettings()

    @property
    def scored_recovery(self) -> Recovery:
        """What allocations are scored with."""
        return self.search.recovery or untrained(self.recovery)


def load_config(path: Path, overrides: Sequence[str] = (), **values: Any) -> Config:
    """Reads a YAML file and applies `a.b=value` overrides, then keyword values that are not None.

    A local folder of `model` or `samples` becomes absolute: a run keeps its config, and is gone on with from elsewhere.

    Raises:
        LopError: the file is missing or not YAML, or a key is unknown or of the wrong type; one line that names it.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LopError(f"config {path} is missing") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LopError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise LopError(f"config {path} is not a mapping of settings")
    _add_what_was(data)
    for override in overrides:
        _apply(data, override)
    data |= {key: value for key, value in values.items() if value is not None}
    config = parse_config(data, str(path))
    return config.model_copy(update={name: settled(getattr(config, name)) for name in ("model", "samples")})


def parse_config(data: dict[str, Any], where: str) -> Config:
    """Validates settings.

    Raises:
        LopError: a key is unknown, missing or of the wrong type.
    """
    try:
        # JSON mode, strict: lists become tuples, and nothing else changes its type.
        return Config.model_validate_json(_json(data))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        # A group's own check names the values that it is about.
        plain = first["type"] in ("missing", "json_invalid", *_WORDS) or isinstance(first["input"], dict)
        got = "" if plain else f", not {first['input']!r}"
        what = _WORDS.get(first["type"], first["msg"].removeprefix("Value error, "))
        raise LopError(f"{where}: {key}: {what}{got}") from None


def _json(data: Any) -> str:
    try:
        return json.dumps(data)
    except (TypeError, ValueError) as error:
        raise LopError(f"a setting is not a number, text or list: {error}") from None


def save_config(config: Config, path: Path) -> None:
    """Writes the whole config as YAML."""
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def find_config(name: str) -> Path:
    """The path of a config: a file's path, or the name of one that comes along, such as `tiny` or `demo`."""
    package = Path(str(files("lop")))
    # Inside the package where a wheel put it, and what lies beside that is not LOP's; in a checkout beside the package.
    folder = inside if (inside := package / "configs").is_dir() else package.parent / "configs"
    return shipped if (shipped := folder / f"{name}.yaml").is_file() else Path(name)


def config_for(model: str | None, *, folder: Path | None = None) -> Path:
    """The config that goes with a model where none is named: the run's own, else the one made for the model.

    Args:
        folder: the run's, if there is one.
    """
    if folder is not None and (own := folder / "config.yaml").is_file():
        return own
    name = model or EMBEDDED
    return find_config(name if name in SHIPPED else "qwen2_5_vl_7b")


def _add_what_was(data: dict[str, Any]) -> None:
    """Fills in what a run's own config, which says everything, does not say because it was not there yet to be said.

    Its search went without, and its ledger and results stay what they are.
    """
    search = data.get("search")
    if isinstance(search, dict) and all(name in data for name in _ALWAYS_SAVED):
        for name, value in BEFORE.items():
            search.setdefault(name, value)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise LopError(f"--set {override!r}: write key=value, for instance search.simulations=50")
    *parents, last = key.split(".")
    place = data
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise LopError(f"--set {override!r}: {parent} is not a group of settings")
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise LopError(f"--set {override!r}: {text!r} is not a YAML value") from None
