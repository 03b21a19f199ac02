"""What `lop measure` found: how far pruned and quantised models are from the dense one. Read without torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lop.run.run import Run
from lop.storage.files import read_as
from lop.storage.fingerprint import check_fingerprints


@dataclass(frozen=True)
class Quality:
    """One pruned and quantised model.

    Attributes:
        ratio: share of the FFN neurons that were removed.
        bits: of the weights.
        bytes: of the checkpoint's tensors, in format `hf`.
        divergence: KL(dense ‖ this) on the reward samples, in nats.
    """

    ratio: float
    bits: int
    bytes: int
    divergence: float


@dataclass(frozen=True)
class Qualities:
    """What was measured of one model.

    Attributes:
        recovery: after pruning, of all.
        samples: reward samples that it was measured on.
        measured: by bits and ratio.
    """

    recovery: str
    samples: int
    measured: tuple[Quality, ...]

    @property
    def bits(self) -> tuple[int, ...]:
        """All that were measured, the most first."""
        return tuple(sorted({quality.bits for quality in self.measured}, reverse=True))

    def at(self, bits: int, ratio: float) -> float | None:
        """The divergence to expect: interpolated between the ratios measured, where more pruning is never better.

        None beyond the ratios measured.
        """
        mine = sorted((q.ratio, q.divergence) for q in self.measured if q.bits == bits)
        if not mine or not mine[0][0] - 1e-9 <= ratio <= mine[-1][0] + 1e-9:
            return None
        ratios, divergences = zip(*mine)
        return float(np.interp(ratio, ratios, np.maximum.accumulate(divergences)))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Qualities":
        """The inverse of `as_dict`."""
        return cls(data["recovery"], data["samples"], tuple(Quality(**entry) for entry in data["measured"]))


def quality_fingerprints(run: Run) -> dict[str, str]:
    """What the run's qualities depend on, but for the settings of `measure` and the recovery, which the file tells."""
    made = {name: value for name, value in run.evaluation_fingerprints.items() if name not in ("recovery", "kept back")}
    return {**made, "predictor": run.predictor_fingerprint}


def read_qualities(run: Run) -> Qualities | None:
    """What was measured for a run; None if nothing was.

    Raises:
        LopError: it was measured with another model, other samples or another predictor.
    """
    if not run.qualities_file.exists():
        return None
    found, qualities = read_as(
        run.qualities_file, lambda data: (dict(data["fingerprints"]), Qualities.from_dict(data["qualities"]))
    )
    check_fingerprints(str(run.qualities_file), found, quality_fingerprints(run))
    return qualities
