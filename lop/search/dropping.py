"""What a backbone says where images lose tokens on the way, and what it computes for that."""

from torch import Tensor

from lop.model.backbone import Backbone
from lop.model.dropping import Plan, dropped_tails
from lop.model.encoding import Batch, Encoded
from lop.model.flops import flops
from lop.search.scoring import Scoring


class DroppingScoring(Scoring):
    """Scores as `Scoring` does, with tokens dropped by a plan; None drops none.

    Attributes:
        flops: of all batches scored so far; see `lop.model.flops`.
    """

    def __init__(self, backbone: Backbone, encoded: Encoded, plan: Plan | None) -> None:
        super().__init__(backbone, encoded)
        self._plan = plan
        self.flops = 0

    def tails(self, batch: Batch, x: Tensor | None = None, *, first: int = 0) -> Tensor:
        """As `Scoring.tails`, from the embeddings only."""
        assert x is None
        assert not first
        if self._plan:
            found, lengths = dropped_tails(self._backbone, batch, self._plan)
        else:
            found = super().tails(batch)
            whole = [group.length for group in batch.groups for _ in range(group.count)]
            lengths = [whole] * len(self._backbone.layers)
        self.flops += flops(self._backbone, lengths, len(batch.places))
        return found
