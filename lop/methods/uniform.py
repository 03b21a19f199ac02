"""Equal ratios on all axes, of the units that LOP's own importance ranks last."""

from lop.methods.method import Method, Root, Side, reading
from lop.methods.spread import equal_ratios

METHOD = Method(
    "uniform",
    Side.BASELINE,
    reading(equal_ratios, is_of_axes=True),
    root=Root.READ,
    start=equal_ratios,
    is_of_axes=True,
    in_report=True,
)
