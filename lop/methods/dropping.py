"""Ways to compute less that leave the weights as they are: for each input other tokens, or other neurons."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lop.model.backbone import Backbone
    from lop.model.dropping import Plan
    from lop.model.encoding import Encoded


@dataclass(frozen=True)
class Dropping:
    """A way to drop images' tokens on the way through the layers.

    Attributes:
        name: in configs and reports.
        plan: for a number of layers and the share of an image's tokens to drop. Ways to drop the same share take
            equally many tokens through layers, all layers together.
        label: in pictures.
    """

    name: str
    plan: "Callable[[int, float], Plan]"
    label: str


@dataclass(frozen=True)
class Contextual:
    """A way to use other neurons for each token.

    Attributes:
        name: in reports.
        make: of a dense backbone with an `ElasticFfn` a layer, the calibration samples, and how many neurons [L] of
            each layer a token is to use, the backbone that does.
        label: in pictures.
    """

    name: str
    make: "Callable[[Backbone, Encoded, Sequence[int]], Backbone]"
    label: str
