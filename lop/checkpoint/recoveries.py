"""What may be done after pruning, by its name in configs; `lop.checkpoint.recovery` does it."""

from dataclasses import dataclass

# A key of `RECOVERIES`.
Recovery = str


@dataclass(frozen=True)
class Mending:
    """What a recovery does.

    Attributes:
        adds_bias: each layer's `down_proj` gets a bias, which not every format has a place for.
        refits: each layer's `down_proj` is solved for anew, which takes the model and the calibration samples.
        trains: what comes of that then learns from the dense model, which takes many times as long (`lop.distil`).
    """

    adds_bias: bool = False
    refits: bool = False
    trains: bool = False


RECOVERIES = {
    "none": Mending(),
    "bias": Mending(adds_bias=True),
    "refit": Mending(refits=True),
    "distil": Mending(refits=True, trains=True),
}
# What takes so little that each of many allocations can have it.
UNTRAINED = {name: mending for name, mending in RECOVERIES.items() if not mending.trains}


def untrained(recovery: Recovery) -> Recovery:
    """What a recovery is before any training: `distil` starts from `refit`."""
    if not RECOVERIES[recovery].trains:
        return recovery
    return next(name for name, mending in UNTRAINED.items() if mending.refits)
