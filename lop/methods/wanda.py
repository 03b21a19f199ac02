"""Wanda-sp (Sun et al. 2023; structured as in An et al. 2023): equal ratios, of the neurons of least weight × input."""

from lop.methods.method import Method, Root, Side, reading
from lop.methods.spread import by_threshold, equal_ratios

METHOD = Method(
    "wanda",
    Side.BASELINE,
    reading(equal_ratios),
    importance="wanda",
    root=Root.READ,
    start=by_threshold("wanda"),
    in_report=True,
    label="Wanda-sp",
)
