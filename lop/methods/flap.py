"""FLAP (An et al. 2023) as published, WIFV with one threshold over all layers (AL-AM) and bias; and its other settings.

These are three scores, equal ratios (UL-UM) or one threshold, with and without bias. One of them, WIFN with equal
ratios and no bias, is Wanda-sp, and stands under that name.

All of them know FFNs alone. `flap-heads` prunes attention, too, as published: by one threshold over neurons and heads
together, where the best are kept until the budget of parameters is spent. A neuron's score is its metric standardised
within its layer; a head's is `lop.model.importance.flap_groups`: the squared metric of the columns of `o_proj`,
standardised within the layer, its mean over the head's columns. Published heads are those of LLaMA, each with keys of
its own; here what goes is a group, a key/value head with the query heads that share it, and the mean is over all of its
columns. Published, the threshold is where the parameters kept are nearest to those asked for, with 512/3 neurons to a
head; here none too many are kept, and a unit costs what it has. What a lost head said on average is no bias of
`o_proj`, which has none in these models: attention goes without.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from lop.methods.method import Method, Need, Root, Side, reading
from lop.methods.spread import by_threshold, equal_ratios, joint_threshold
from lop.model.importance import flap, flap_groups, standardised
from lop.space.allocation import Allocation, Space

if TYPE_CHECKING:
    from lop.model.statistics import NeuronStatistics

# FLAP's names for the importances that it prunes by.
_SCORES = {"wifv": "flap", "wifn": "wanda", "ifv": "fluctuation"}
_PUBLISHED, _WANDA = "flap-wifv-al-am-bias", "flap-wifn-ul-um"
# Of the variants, the one that the search may start from: it ranks layers otherwise than FLAP as published does.
_ROOT = "flap-ifv-al-am"


def _variant(metric: str, is_global: bool, bias: bool) -> Method:
    name = f"flap-{metric}-{'al-am' if is_global else 'ul-um'}{'-bias' if bias else ''}"
    threshold = by_threshold(_SCORES[metric])
    return Method(
        name,
        Side.BASELINE,
        reading(threshold if is_global else equal_ratios),
        importance=_SCORES[metric],
        bias=bias,
        start=threshold,
        root=Root.READ if name == _ROOT else None,
    )


_ALL = {
    method.name: method
    for metric in _SCORES
    for is_global in (True, False)
    for bias in (True, False)
    for method in [_variant(metric, is_global, bias)]
}
METHOD = replace(_ALL[_PUBLISHED], name="flap", root=Root.READ, in_report=True, has_profile=True, label="FLAP")
VARIANTS = tuple(method for name, method in _ALL.items() if name not in (_PUBLISHED, _WANDA))
# What is another method but for its bias, and so the same where all have one recovery.
TWINS = frozenset(name for name in _ALL if name.endswith("-bias")) | {_PUBLISHED.removesuffix("-bias")}


def over_both_parts(statistics: "NeuronStatistics", space: Space, budget: int) -> Allocation:
    """One threshold over the neurons and the groups of heads of all layers; of FFNs alone where attention is dense."""
    if space.attention is None:
        return by_threshold("flap")(statistics, space, budget)
    return joint_threshold(standardised(flap(statistics)), flap_groups(statistics), space, budget)


HEADS = Method(
    "flap-heads",
    Side.BASELINE,
    reading(over_both_parts, is_of_axes=True),
    needs=frozenset({Need.ACTIVATIONS, Need.HEADS}),
    importance="flap-heads",
    bias=True,
    start=over_both_parts,
    is_of_axes=True,
    has_profile=True,
    label="FLAP (heads, too)",
)
