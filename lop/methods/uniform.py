"""Equal ratios in all layers, of the neurons that LOP's own importance ranks last."""

from lop.methods.method import Method, Root, Side, reading
from lop.methods.spread import equal_ratios

METHOD = Method("uniform", Side.BASELINE, reading(equal_ratios), root=Root.READ, start=equal_ratios, in_report=True)
