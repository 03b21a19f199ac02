"""SliceGPT (Ashkboos et al., ICLR 2024): the residual stream is turned onto its principal axes and made narrower.

Before each norm the axes are those of the calibration samples' states, `C = Σ x·xᵀ = Q·D·Qᵀ`; norms' weights are folded
into what follows, rows and columns of all weights are cut, and the states are multiplied by `Qᵀ·Q'` on the way around
each part (the paper's shortcut matrices): see `lop.model.beyond.slicing`. All places are cut to one width, the states
before the head not at all, as in `slicegpt.rotate` of github.com/microsoft/TransformerCompression
(`rotate_and_slice_sequential`, with `do_slice_head` off).

What the matrices cost counts: the width is the largest with which as many parameters are gone as are asked for, the
embeddings' matrix [H, k] included. It stays by itself where the published code folds it into the embeddings, which here
are mostly the head's weights, too (tied): a copy of them would cost more than is saved. Where they are not, folding
would also make them smaller, which is not counted. Published: axes of the states in the sliced model, widths in
multiples of 8; here of the dense model's states, as for all methods, and any width. Not covered: fine-tuning with LoRA
afterwards. It has no recovery, and no checkpoint: no layer of the architecture multiplies the residual stream by a
matrix.
"""

from typing import TYPE_CHECKING

from lop.errors import LopError
from lop.methods.method import Need
from lop.methods.reshaping import Reshaped, Reshaping

if TYPE_CHECKING:
    from lop.model.backbone import Backbone
    from lop.model.encoding import Encoded


def slice_states(backbone: "Backbone", encoded: "Encoded", asked: int, _: bool) -> Reshaped:
    """With narrower states.

    Raises:
        LopError: no width is narrow enough.
    """
    from lop.model.beyond.depth import parameters
    from lop.model.beyond.slicing import principal_axes, sliced, widest

    width = widest(backbone, asked)
    if not width:
        raise LopError(f"no width of the states leaves {asked:,} parameters less: name a smaller ratio for slicegpt")
    found = sliced(backbone, principal_axes(backbone, encoded), width)
    return Reshaped(found, None, parameters(backbone) - parameters(found))


METHOD = Reshaping(
    "slicegpt",
    slice_states,
    frozenset({Need.STATES}),
    "SliceGPT",
    not_exported="no layer of the architecture multiplies the residual stream by a matrix",
)
