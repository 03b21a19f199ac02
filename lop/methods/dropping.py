"""Ways to compute less that leave the weights as they are: images' tokens are dropped on the way through the layers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lop.model.dropping import Plan


@dataclass(frozen=True)
class Dropping:
    """A way to drop tokens.

    Attributes:
        name: in configs and reports.
        plan: for a number of layers and the share of an image's tokens to drop. Ways to drop the same share take
            equally many tokens through layers, all layers together.
        label: in pictures.
    """

    name: str
    plan: "Callable[[int, float], Plan]"
    label: str
