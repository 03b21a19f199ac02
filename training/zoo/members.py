"""Who is in the zoo: small Qwen2.5-VLs that differ in whatever a predictor for all models must look past."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from training.tiny.architecture import BackboneShape
from training.tiny.corpus import SOURCE_SHARES


@dataclass(frozen=True)
class Member:
    """One model to be trained.

    Attributes:
        seed: of weights, words' turn and batches.
        steps: of training, each of 128 questions.
        shares: of each source of questions, summing to 1.
    """

    name: str
    shape: BackboneShape
    seed: int
    steps: int
    shares: Mapping[str, float] = field(default_factory=lambda: SOURCE_SHARES)

    @property
    def granularity(self) -> int:
        """Widths are multiples of a sixteenth."""
        return self.shape.neurons // 16


_FLAGS = {"easy-vqa": 0.05, "fashion-mnist": 0.05, "flags": 0.9}
_THINGS = {"easy-vqa": 0.4, "fashion-mnist": 0.4, "flags": 0.2}

MEMBERS = {
    member.name: member
    for member in (
        Member("wide6", BackboneShape(6, 96, 256, 4, 1), 1, 700),
        Member("even8", BackboneShape(8, 72, 192, 3, 1), 2, 500),
        Member("flags10", BackboneShape(10, 72, 128, 3, 1), 3, 450, _FLAGS),
        Member("broad12", BackboneShape(12, 96, 224, 4, 2), 4, 350),
        Member("small14", BackboneShape(14, 48, 128, 2, 1), 5, 400),
        Member("short16", BackboneShape(16, 72, 160, 3, 1), 6, 300),
        Member("things18", BackboneShape(18, 48, 160, 2, 1), 7, 350, _THINGS),
        Member("deep24", BackboneShape(24, 48, 96, 2, 1), 8, 300),
    )
}
