"""What a backbone says where less is computed for images' tokens, and what it computes for that."""

from torch import Tensor

from lop.model.backbone import Backbone
from lop.model.beyond.dropping import Reading
from lop.model.beyond.flops import flops
from lop.model.encoding import Batch, Encoded
from lop.search.scoring import Scoring


class DroppingScoring(Scoring):
    """Scores as `Scoring` does, of what is read in some way; None reads all of it.

    Attributes:
        flops: of all batches scored so far; see `lop.model.beyond.flops`.
    """

    def __init__(self, backbone: Backbone, encoded: Encoded, reading: Reading | None) -> None:
        super().__init__(backbone, encoded)
        self._reading = reading
        self.flops = 0

    def tails(self, batch: Batch, x: Tensor | None = None, *, first: int = 0) -> Tensor:
        """As `Scoring.tails`, from the embeddings only."""
        assert x is None
        assert not first
        if self._reading:
            found, spent = self._reading(self._backbone, batch)
        else:
            found = super().tails(batch)
            whole = [group.length for group in batch.groups for _ in range(group.count)]
            spent = flops(self._backbone, [whole] * len(self._backbone.layers), len(batch.places))
        self.flops += spent
        return found
