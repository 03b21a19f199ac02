"""FLAP (An et al. 2023) as published, WIFV with one threshold over all layers (AL-AM) and bias; and its other settings.

These are three scores, equal ratios (UL-UM) or one threshold, with and without bias. One of them, WIFN with equal
ratios and no bias, is Wanda-sp, and stands under that name.
"""

from dataclasses import replace

from lop.methods.method import Method, Root, Side, reading
from lop.methods.spread import by_threshold, equal_ratios

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
