"""Magnitude: equal ratios, of the neurons whose columns of `down_proj` are shortest; needs the weights alone."""

from lop.methods.method import Method, Root, Side, reading
from lop.methods.spread import by_threshold, equal_ratios

METHOD = Method(
    "magnitude",
    Side.BASELINE,
    reading(equal_ratios),
    needs=frozenset(),
    importance="magnitude",
    root=Root.READ,
    start=by_threshold("magnitude"),
    in_report=True,
)
