"""Every way to prune, by the name that configs and reports give it, in the order in which reports show them."""

from lop.methods import (
    alphapruning,
    evolution,
    flap,
    lop_predictor,
    lop_search,
    magnitude,
    owl,
    random,
    sensitivity,
    tree,
    uniform,
    wanda,
)
from lop.methods.method import Method, Side

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        uniform.METHOD,
        magnitude.METHOD,
        wanda.METHOD,
        flap.METHOD,
        *flap.VARIANTS,
        owl.METHOD,
        alphapruning.METHOD,
        random.METHOD,
        sensitivity.METHOD,
        evolution.METHOD,
        tree.METHOD,
        lop_search.METHOD,
        lop_predictor.METHOD,
    )
}
BASELINES = tuple(name for name, method in METHODS.items() if method.side is Side.BASELINE)
SEARCHES = tuple(name for name, method in METHODS.items() if method.search)
ROOTS = tuple(name for name, method in METHODS.items() if method.root)
IN_REPORT = tuple(name for name, method in METHODS.items() if method.in_report)
# What the paper's speed-ups are told against.
REFERENCE = flap.METHOD.name
