"""Every way to prune, by the name that configs and reports give it, in the order in which reports show them."""

from lop.methods import (
    alphapruning,
    darwinlm,
    dejavu,
    efficientllava,
    evolution,
    fastv,
    flap,
    llm_pruner,
    llm_streamline,
    lop_predictor,
    lop_search,
    magnitude,
    minitron,
    owl,
    puzzletron,
    random,
    sensitivity,
    shortgpt,
    slicegpt,
    sparsevlm,
    tree,
    tyr,
    uniform,
    wanda,
    yopo,
)
from lop.methods.dropping import Contextual, Dropping
from lop.methods.method import SURVEYED, Method, Side
from lop.methods.reshaping import Reshaping

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        uniform.METHOD,
        magnitude.METHOD,
        wanda.METHOD,
        flap.METHOD,
        *flap.VARIANTS,
        flap.HEADS,
        owl.METHOD,
        alphapruning.METHOD,
        llm_pruner.METHOD,
        llm_pruner.VECTOR,
        llm_pruner.HEADS,
        llm_pruner.HEADS_VECTOR,
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
# Those that leave the FFNs as they are.
RESHAPINGS: dict[str, Reshaping] = {
    reshaping.name: reshaping
    for reshaping in (
        shortgpt.METHOD,
        llm_streamline.METHOD,
        llm_streamline.LINEAR,
        llm_streamline.NONE,
        slicegpt.METHOD,
    )
}
# Those that leave the weights as they are, and compute less for images' tokens: they go together with any other.
DROPPINGS: dict[str, Dropping] = {dropping.name: dropping for dropping in (fastv.METHOD, sparsevlm.METHOD, yopo.METHOD)}
# Those that compute other neurons for each token, with all weights there.
CONTEXTUAL: dict[str, Contextual] = {dejavu.METHOD.name: dejavu.METHOD}
EVERY: dict[str, Method | Reshaping] = {**METHODS, **RESHAPINGS}
BASELINES = tuple(name for name, method in METHODS.items() if method.side is Side.BASELINE)
# What tables have if the config names none: those that cost no further pass over the calibration samples.
USUAL_BASELINES = tuple(name for name in BASELINES if not METHODS[name].needs & SURVEYED)
SEARCHES = tuple(name for name, method in METHODS.items() if method.search)
ROOTS = tuple(name for name, method in METHODS.items() if method.root)
IN_REPORT = tuple(name for name, method in METHODS.items() if method.in_report)
# What the paper's speed-ups are told against.
REFERENCE = flap.METHOD.name
