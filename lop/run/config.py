"""The settings of a run: YAML files from `configs/`, validated on load, with `--set key=value` on top."""

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetPydanticSchema, ValidationError, model_validator
from pydantic_core import core_schema

from lop.checkpoint.recoveries import RECOVERIES, UNTRAINED, untrained
from lop.errors import LopError
from lop.methods.method import Root as RootKind
from lop.methods.registry import BASELINES, EVERY, METHODS, RESHAPINGS, ROOTS, SEARCHES
from lop.model.find import EMBEDDED, SHIPPED, settled
from lop.model.image_settings import ImageSettings
from lop.model.importance import IMPORTANCES
from lop.predictor.inference import NETWORKS
from lop.search.rewards import REWARDS, TIE_BREAKERS
from lop.search.tree import TreeOptions
from lop.space.allocation import FFN, PARTS
from lop.storage.files import atomic_file

Ratio = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


def _one_of(names: Iterable[str]) -> GetPydanticSchema:
    """The keys of a registry, as what a setting may be."""
    return GetPydanticSchema(lambda _source, _handler: core_schema.literal_schema(list(names)))


Recovery = Annotated[str, _one_of(RECOVERIES)]
Untrained = Annotated[str, _one_of(UNTRAINED)]
Reward = Annotated[str, _one_of(REWARDS)]
TieBreaker = Annotated[str, _one_of(TIE_BREAKERS)]
Importance = Annotated[str, _one_of(IMPORTANCES)]
Root = Annotated[str, _one_of(ROOTS)]
Baseline = Annotated[str, _one_of((*BASELINES, *RESHAPINGS))]
Rival = Annotated[str, _one_of(SEARCHES)]
MethodName = Annotated[str, _one_of(name for name, method in EVERY.items() if method.is_compared)]
Architecture = Annotated[str, _one_of(NETWORKS)]


_Item = TypeVar("_Item")
_MOST_TARGETS = 1000


def _distinct(values: tuple[_Item, ...]) -> tuple[_Item, ...]:
    if len(set(values)) < len(values):
        raise ValueError("it names one of them twice")
    return values


# A list in which nothing stands twice; `Several` of them are at least one.
Distinct = Annotated[tuple[_Item, ...], AfterValidator(_distinct)]
Several = Annotated[tuple[_Item, ...], Field(min_length=1), AfterValidator(_distinct)]


def _parts(values: tuple[str, ...]) -> tuple[str, ...]:
    if FFN not in values:
        raise ValueError(f"it must name {FFN!r}")
    return tuple(name for name in PARTS if name in values)


Parts = Annotated[Several[Annotated[str, _one_of(PARTS)]], AfterValidator(_parts)]


# Settings that no one writes by hand all together, and every run's own config has.
_ALWAYS_SAVED = ("seed", "recovery", "device", "dtype", "threads", "evaluation_seconds", "train", "compare", "tables")
# What a search did before these settings were there.
_BEFORE: dict[str, Any] = {"recovery": "none", "method": "paper", "confirm": None, "start": None, "descent": None}

# What pydantic says in words of its own.
_WORDS = {"too_short": "it is empty: name one at least", "extra_forbidden": "there is no such setting"}


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Targets(_Settings):
    """Target ratios from `first` to `last` in equal steps."""

    first: Ratio
    last: Ratio
    step: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _ordered(self) -> "Targets":
        if self.last < self.first:
            raise ValueError(f"last ({self.last}) must not be below first ({self.first})")
        if (self.last - self.first) / self.step > _MOST_TARGETS:
            raise ValueError(f"step {self.step} makes more than {_MOST_TARGETS} targets")
        return self

    @property
    def ratios(self) -> tuple[float, ...]:
        """The targets, rounded to six decimals so that they print as they were meant."""
        count = round((self.last - self.first) / self.step)
        return tuple(round(self.first + index * self.step, 6) for index in range(count + 1))


class RacingSettings(_Settings):
    """Whether and how candidates race: `lop.search.racing`. `rank`: against the how-manieth best of their target."""

    rounds: Annotated[int, Field(ge=2)] = 16
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.9
    rank: Positive = 1


class ConfirmSettings(_Settings):
    """How a search's answer is confirmed: on which share of the reward samples, and among how many of its best."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    candidates: Positive = 4


class DescentSettings(_Settings):
    """Where a search starts from, beside its roots: `rounds` steps downhill.

    They are measured on so many reward `samples`, and judged on as many others.
    """

    samples: Positive = 96
    rounds: Positive = 3


class SearchSettings(_Settings):
    """The UCB trees; see `lop.search.tree.TreeOptions` for what each number does.

    The reward decides (the paper's is accuracy), and the tie-breaker tells allocations of equal reward apart; see
    `lop.search.evaluation.Evaluation`.
    Roots are methods of `lop.methods.registry`: most are read off the statistics, one is found by the search itself,
    and those that search by themselves must have been run by `lop rivals` for its targets.
    `method` is where moves come from: `guided` or the `paper`'s (`lop.search.tree.TreeOptions`).
    `confirm`: part of the reward samples is kept back from the search (`lop.search.confirmation`).
    `descent`: steps downhill are taken before the trees begin, which start from where they lead, too
    (`lop.search.descent`); not with method `paper`.
    `recovery` is what allocations are scored with; if it is not set, that with which checkpoints ship, or what that one
    starts from where it trains.
    `sensitivity_levels` is at how many widths each layer is scanned alone, for the root (or the rival) of that name.
    `start` is the folder of a finished run of the same model: each target starts from that run's largest answer that
    its budget holds, with attention dense where it had none open, and is confirmed against it.
    """

    targets: Targets
    simulations: Positive = 300
    evaluations: Positive = 200
    exploration: Annotated[float, Field(ge=0)] = 0.02
    step: Annotated[float, Field(gt=0, le=1)] = 0.3
    decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    children: Positive = 6
    depth: Positive = 12
    window: Positive = 2
    roots: Distinct[Root] = ("uniform", "magnitude", "wanda", "flap", "sensitivity")
    sensitivity_levels: Positive = 20
    reward: Reward = "log_probability"
    tie_breaker: TieBreaker = "log_probability"
    method: Literal["guided", "paper"] = "guided"
    recovery: Untrained | None = None
    racing: RacingSettings | None = None
    confirm: ConfirmSettings | None = ConfirmSettings()
    descent: DescentSettings | None = DescentSettings()
    start: str | None = None

    @property
    def needs_divergence(self) -> bool:
        """Whether evaluations are compared with the dense model's distributions."""
        return any(REWARDS[name].of_dense for name in (self.reward, self.tie_breaker)) or self.scans

    @property
    def scans(self) -> bool:
        """Whether layers are scanned one by one before the trees begin, for a root."""
        return any(METHODS[name].root is RootKind.SCANNED for name in self.roots)

    @property
    def descends(self) -> DescentSettings | None:
        """How, if it does."""
        return self.descent if self.method == "guided" else None

    @property
    def needs_answers(self) -> bool:
        """Whether evaluations are told apart by what is right or wrong, which prose never is."""
        return any(REWARDS[name].of_answers for name in (self.reward, self.tie_breaker))

    def recorded(self, *left_out: str) -> dict[str, Any]:
        """What the fingerprints of results are made of: the settings, but for those that change nothing of before.

        So searches made before there were such settings keep theirs.
        """
        values = self.model_dump(mode="json", exclude=set(left_out))
        return {name: value for name, value in values.items() if name not in _BEFORE or value != _BEFORE[name]}

    def tree_options(self) -> TreeOptions:
        """What a tree needs of these settings."""
        return TreeOptions(
            simulations=self.simulations,
            evaluations=self.evaluations,
            exploration=self.exploration,
            step=self.step,
            decay=self.decay,
            children=self.children,
            depth=self.depth,
            window=self.window,
            guided=self.method == "guided",
            opponent=self.racing.rank if self.racing else 0,
        )


class TrainSettings(_Settings):
    """How predictors are trained (LOP 4.3).

    The paper's 64 epochs are too few for as few pairs as a search of 27 targets leaves, three batches an epoch; the
    epoch with the least validation error is kept.
    """

    architectures: Several[Architecture] = ("mlp", "lstm", "transformer")
    batch: Positive = 40
    epochs: Positive = 256
    learning_rates: Several[Annotated[float, Field(gt=0)]] = (1e-3,)
    best_per_target: Positive = 5
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.2


class CompareSettings(_Settings):
    """What `lop compare` reports: every method as published at `targets`, and with each recovery at others.

    All of these targets must have been searched. Without `recoveries` there is no table of them. `limit` takes only so
    many test questions, drawn by the config's seed. `methods` are names of `lop.methods.registry`; None means the few
    that the report usually has. Those that search by themselves are run for all these targets.
    """

    targets: Several[Ratio] = (0.2, 0.3, 0.5)
    methods: Several[MethodName] | None = None
    recovery_targets: Several[Ratio] = (0.5, 0.6)
    recoveries: Distinct[Untrained] = ("none", "bias", "refit")
    limit: Positive | None = None


class MeasureSettings(_Settings):
    """What `lop measure` measures: each ratio with weights of each number of bits."""

    ratios: Several[Ratio] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    bits: Distinct[Literal[16, 8, 4]] = (16, 8, 4)


class TablesSettings(_Settings):
    """What `lop compare` makes of the benchmark: the paper's tables and figures.

    `baselines` are names of `lop.methods.registry`; None means all that prune neurons and read no more than the
    statistics and the weights. `rivals` search as long as LOP does; they are run by `lop rivals`, and by `lop compare`
    where they have not been. `limit` takes only so many groups of questions of each part of a task.
    """

    targets: Several[Ratio] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    baselines: Several[Baseline] | None = None
    rivals: Distinct[Rival] = ("random", "sensitivity", "evolution", "mcts-noroots")
    seeds: Positive = 1
    limit: Positive | None = None


class DistilSettings(_Settings):
    """How a pruned model learns from the dense one (`lop.distil.training`).

    `tokens` are read in training, in steps of about `batch_tokens`. `weights` that learn: the FFNs', or those of the
    whole backbone but for embeddings and head; `lora_rank` above zero learns adapters of that rank instead. Of the
    teacher's distributions the `top_k` likeliest tokens are kept one by one. `prompt` is what a prompt's token counts
    where an answer's counts 1. After each layer of `layers` states are matched, too, with weight `states`.
    Every so many steps it is looked at `reward_samples`, and saved; `patience` looks without gain end it.
    """

    tokens: Positive = 200_000
    batch_tokens: Positive = 2048
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weights: Literal["ffn", "backbone"] = "backbone"
    lora_rank: Annotated[int, Field(ge=0)] = 0
    top_k: Positive = 64
    prompt: Annotated[float, Field(ge=0, le=1)] = 0.1
    layers: Distinct[Annotated[int, Field(ge=0)]] = ()
    states: Annotated[float, Field(gt=0)] = 1.0
    every: Positive = 8
    patience: Positive = 6
    reward_samples: Positive = 256


class Config(_Settings):
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
        for name, value in _BEFORE.items():
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
