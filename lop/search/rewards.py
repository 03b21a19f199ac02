"""What a search may be rewarded by: the measures of an evaluation, by the name that a config gives them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A field of `lop.search.evaluation.Evaluation`.

    Attributes:
        of_answers: it tells right from wrong, and prose has neither.
        of_dense: it compares with the dense model's distributions.
        is_loss: less of it is better.
        is_count: of samples, so that candidates can race for it, and ties need breaking.
    """

    of_answers: bool = False
    of_dense: bool = False
    is_loss: bool = False
    is_count: bool = False


REWARDS = {
    "accuracy": Measure(of_answers=True, is_count=True),
    "log_probability": Measure(),
    "margin": Measure(of_answers=True),
    "divergence": Measure(of_dense=True, is_loss=True),
}
TIE_BREAKERS = tuple(name for name, measure in REWARDS.items() if not measure.is_count)
