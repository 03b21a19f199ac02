"""What may be done after pruning, by its name in configs; `lop.checkpoint.recovery` does it."""

from dataclasses import dataclass

# A key of `RECOVERIES`.
Recovery = str


@dataclass(frozen=True)
class Mending:
    """What a recovery does to each layer's `down_proj`.

    Attributes:
        adds_bias: it gets a bias, which not every format has a place for.
        refits: its weights are solved for anew, which takes the model and the calibration samples.
    """

    adds_bias: bool = False
    refits: bool = False


RECOVERIES = {"none": Mending(), "bias": Mending(adds_bias=True), "refit": Mending(refits=True)}
