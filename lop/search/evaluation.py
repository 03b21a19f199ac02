"""What scoring an allocation comes to: the value that trees learn from and ledgers keep."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lop.search.racing import Candidate
from lop.search.rewards import REWARDS

# Nats, of a failed evaluation, by any finer reward: finite, because a tree averages.
_WORST = 24.0


@dataclass(frozen=True)
class Evaluation:
    """One allocation's result on the reward samples.

    Attributes:
        accuracy: share of the questions, which prose is not, answered exactly; 0 if there are none. Where a race was
            given up, what was raced for is estimated, as the opponent's plus the mean difference to it on those scored.
        log_probability: mean of `Scores.log_probability` over the samples scored.
        error: why the allocation could not be evaluated; empty where it was.
        margin: mean of `Scores.margin` over the questions scored; None if there are none.
        divergence: mean of `Scores.divergence` over the samples scored, if it was asked for.
        hits, values: what later candidates race against, the one or the other by what they race for; see
            `lop.search.racing.pack` and `pack_values`.
        opponent: the widths of the allocation that this one raced against.
        scored: the samples scored before the race was given up; None if that was all.
        confirms: whether it was on the samples kept back from the search; None if not.
        few: on which of the few samples of a descent it was; None if on none.
    """

    accuracy: float
    log_probability: float
    error: str = ""
    margin: float | None = None
    divergence: float | None = None
    hits: str | None = None
    values: str | None = None
    opponent: tuple[int, ...] | None = None
    scored: int | None = None
    confirms: bool | None = None
    few: int | None = None

    @classmethod
    def failed(cls, error: str, candidate: Candidate | None = None) -> "Evaluation":
        """What stands for an allocation that cannot be evaluated: the worst result.

        No answer right, and each as improbable as two tokens guessed among 150,000.
        """
        opponent = candidate.opponent if candidate else None
        return cls(
            0.0,
            -_WORST,
            error=error,
            opponent=None if opponent is None else opponent.allocation.widths,
            confirms=(candidate is not None and candidate.confirms) or None,
            few=candidate.few or None if candidate else None,
        )

    @property
    def record(self) -> str | None:
        """What an opponent is known by; None if later candidates cannot race against this one."""
        return (self.hits or self.values) if self.is_complete else None

    @property
    def is_complete(self) -> bool:
        """Whether all samples were scored."""
        return self.scored is None

    def worth(self, name: str) -> float:
        """The value of `accuracy` or of one of the finer rewards, as a number of which more is better."""
        value = getattr(self, name)
        if value is None:
            return -_WORST  # It failed.
        return float(-value if REWARDS[name].is_loss else value)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: those that are there."""
        return {name: value for name, value in vars(self).items() if value not in (None, "")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Evaluation":
        """The inverse of `as_dict`, read from JSON."""
        values = dict(values)
        opponent = values.pop("rival", values.pop("opponent", None))  # As earlier records call it.
        return cls(**values, opponent=None if opponent is None else tuple(opponent))


class Scorer(Protocol):
    """Whatever evaluates candidates."""

    def evaluate(self, candidate: Candidate) -> Evaluation:
        """The result on all samples, or given up early where the candidate loses to its opponent."""


@dataclass(frozen=True)
class Scorers:
    """Evaluates candidates on the samples that each is meant for."""

    search: Scorer
    confirmation: Scorer | None = None
    few: Mapping[int, Scorer] = field(default_factory=dict)

    def evaluate(self, candidate: Candidate) -> Evaluation:
        """The result on those samples."""
        if candidate.confirms:
            assert self.confirmation
            return replace(self.confirmation.evaluate(candidate), confirms=True)
        if candidate.few:
            return replace(self.few[candidate.few].evaluate(candidate), few=candidate.few)
        return self.search.evaluate(candidate)
