"""Every way to prune, by the name that configs and reports give it, in the order in which reports show them."""

from lop.methods import (
    alphapruning,
    darwinlm,
    efficientllava,
    evolution,
    flap,
    llm_pruner,
    lop_predictor,
    lop_search,
    magnitude,
    minitron,
    owl,
    puzzletron,
    random,
    sensitivity,
    tree,
    tyr,
    uniform,
    wanda,
)
from lop.methods.method import SURVEYED, Method, Side

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
        llm_pruner.METHOD,
        llm_pruner.VECTOR,
        minitron.METHOD,
        darwinlm.METHOD,
        random.METHOD,
        sensitivity.METHOD,
        puzzletron.METHOD,
        evolution.METHOD,
        tyr.METHOD,
        efficientllava.METHOD,
        tree.METHOD,
        lop_search.METHOD,
        lop_predictor.METHOD,
        lop_predictor.GENERAL,
    )
}
BASELINES = tuple(name for name, method in METHODS.items() if method.side is Side.BASELINE)
# What tables have if the config names none: those that cost no further pass over the calibration samples.
USUAL_BASELINES = tuple(name for name in BASELINES if not METHODS[name].needs & SURVEYED)
SEARCHES = tuple(name for name, method in METHODS.items() if method.search)
ROOTS = tuple(name for name, method in METHODS.items() if method.root)
IN_REPORT = tuple(name for name, method in METHODS.items() if method.in_report)
# What the paper's speed-ups are told against.
REFERENCE = flap.METHOD.name
