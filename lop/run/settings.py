"""What a run's settings hold, part by part; `lop.run.config` reads and writes them."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetPydanticSchema, model_validator
from pydantic_core import core_schema

from lop.checkpoint.recoveries import RECOVERIES, UNTRAINED
from lop.methods.method import Root as RootKind
from lop.methods.registry import BASELINES, CONTEXTUAL, DROPPINGS, EVERY, METHODS, RESHAPINGS, ROOTS, SEARCHES
from lop.model.importance import IMPORTANCES
from lop.predictor.inference import NETWORKS
from lop.search.rewards import REWARDS, TIE_BREAKERS
from lop.search.tree import TreeOptions
from lop.space.allocation import FFN, PARTS

Ratio = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
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
_COMPARED = [name for name, method in EVERY.items() if method.is_compared]
MethodName = Annotated[str, _one_of((*_COMPARED, *DROPPINGS, *CONTEXTUAL))]
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

# What a search did before these settings were there.
BEFORE: dict[str, Any] = {
    "recovery": "none",
    "method": "paper",
    "confirm": None,
    "start": None,
    "descent": None,
    "blends": 0,
}


class Settings(BaseModel):
    """A part of a run's settings: nothing unknown, nothing of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Targets(Settings):
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


class RacingSettings(Settings):
    """Whether and how candidates race: `lop.search.racing`. `rank`: against the how-manieth best of their target."""

    rounds: Annotated[int, Field(ge=2)] = 16
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.9
    rank: Positive = 1


class ConfirmSettings(Settings):
    """How a search's answer is confirmed: on which share of the reward samples, and among how many of its best."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    candidates: Positive = 4


class DescentSettings(Settings):
    """Where a search starts from, beside its roots: `rounds` steps downhill.

    They are measured on so many reward `samples`, and judged on as many others.
    """

    samples: Positive = 96
    rounds: Positive = 2


class SearchSettings(Settings):
    """The UCB trees; see `lop.search.tree.TreeOptions` for what each number does.

    The reward decides (the paper's is accuracy), and the tie-breaker tells allocations of equal reward apart; see
    `lop.search.evaluation.Evaluation`.
    Roots are methods of `lop.methods.registry`: most are read off the statistics, one is found by the search itself,
    and those that search by themselves must have been run by `lop rivals` for its targets.
    `method` is where moves come from: `guided` or the `paper`'s (`lop.search.tree.TreeOptions`).
    `confirm`: part of the reward samples is kept back from the search (`lop.search.confirmation`).
    `descent`: whether steps downhill are taken before the trees begin, which start from where they lead, too
    (`lop.search.descent`); not with method `paper`.
    `recovery` is what allocations are scored with; if it is not set, that with which checkpoints ship, or what that one
    starts from where it trains.
    `blends`: so many times each target tries mixtures of what its neighbours have found (`lop.search.blending`); not
    with method `paper`.
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
    descent: DescentSettings | None = None
    start: str | None = None
    blends: Annotated[int, Field(ge=0)] = 2

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
    def blended(self) -> int:
        """How many times, if it does."""
        return self.blends if self.method == "guided" else 0

    @property
    def needs_answers(self) -> bool:
        """Whether evaluations are told apart by what is right or wrong, which prose never is."""
        return any(REWARDS[name].of_answers for name in (self.reward, self.tie_breaker))

    def recorded(self, *left_out: str) -> dict[str, Any]:
        """What the fingerprints of results are made of: the settings, but for those that change nothing of before.

        So searches made before there were such settings keep theirs.
        """
        values = self.model_dump(mode="json", exclude=set(left_out))
        if self.descends is None:
            values["descent"] = None
        values["blends"] = self.blended
        return {name: value for name, value in values.items() if name not in BEFORE or value != BEFORE[name]}

    def recorded_of_rivals(self) -> dict[str, Any]:
        """The same of a rival's search, which LOP's own starts, targets and steps are nothing to."""
        return self.recorded("roots", "targets", "confirm", "start", "descent", "blends")

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


class TrainSettings(Settings):
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


class CompareSettings(Settings):
    """What `lop compare` reports: every method at `targets`, and with each recovery at others.

    At `targets` all have the recovery that the search scores with; where that is none, each is as published.

    All of these targets must have been searched. Without `recoveries` there is no table of them. `limit` takes only so
    many test questions, drawn by the config's seed. `methods` are names of `lop.methods.registry`; None means the few
    that the report usually has. Those that search by themselves are run for all these targets. Those that compute less
    and leave the weights have tables of their own: less for images' tokens at `shares` of these (a third, half and
    three quarters), other neurons for each token at `targets`.
    """

    targets: Several[Ratio] = (0.2, 0.3, 0.5)
    methods: Several[MethodName] | None = None
    shares: Several[Share] | None = None
    recovery_targets: Several[Ratio] = (0.5, 0.6)
    recoveries: Distinct[Untrained] = ("none", "bias", "refit")
    limit: Positive | None = None


class MeasureSettings(Settings):
    """What `lop measure` measures: each ratio with weights of each number of bits."""

    ratios: Several[Ratio] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    bits: Distinct[Literal[16, 8, 4]] = (16, 8, 4)


class TablesSettings(Settings):
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


class DistilSettings(Settings):
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
