"""Ways to compute less that leave the weights as they are: less for images' tokens, or other neurons for each token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lop.methods.method import Need

if TYPE_CHECKING:
    from lop.model.backbone import Backbone
    from lop.model.beyond.dropping import Plan, Reading
    from lop.model.encoding import Encoded

Opened = Callable[["Backbone", Callable[[], "Encoded"], float], "Reading"]


@dataclass(frozen=True)
class Dropping:
    """A way to compute less for images' tokens, most of which it drops on the way through the layers.

    Attributes:
        name: in configs and reports.
        open: how a backbone as it is then, of which the calibration samples can be asked for, reads where a share of an
            image's tokens is to be dropped. For the same share all ways compute as much: they take equally many tokens
            through layers, all layers together, or multiply images' tokens by as many weights.
        label: in pictures.
        needs: beside the weights.
    """

    name: str
    open: Opened
    label: str
    needs: frozenset[Need] = frozenset()


@dataclass(frozen=True)
class Contextual:
    """A way to use other neurons for each token.

    Attributes:
        name: in configs and reports.
        make: of a dense backbone with an `ElasticFfn` a layer, the calibration samples, and how many neurons [L] of
            each layer a token is to use, the backbone that does.
        label: in pictures.
        needs: beside the weights.
    """

    name: str
    make: "Callable[[Backbone, Encoded, Sequence[int]], Backbone]"
    label: str
    needs: frozenset[Need]


def planned(plan: "Callable[[int, float], Plan]") -> Opened:
    """How a way reads that knows no more than the number of layers and the share."""

    def opened(backbone: "Backbone", _: "Callable[[], Encoded]", dropped: float) -> "Reading":
        from lop.model.beyond.dropping import read

        return partial(read, plan=plan(len(backbone.layers), dropped))

    return opened
