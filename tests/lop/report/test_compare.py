"""The table of recoveries: paired differences, kept and shown."""

import numpy as np

from lop.model.samples import SampleSets
from lop.report.compare import Comparison, _recoveries
from lop.report.report import _recovery_parts


def test_recoveries_are_held_against_those_before_them(samples: SampleSets) -> None:
    chosen = samples.test[:90]
    rng = np.random.default_rng(0)
    kinds = ("none", "bias", "refit")
    hits = {
        (method, target, kind): rng.random(len(chosen)) < share
        for method in ("flap", "lop-search")
        for target in (0.5, 0.6)
        for kind, share in zip(kinds, (0.5, 0.6, 0.9))
    }
    found = tuple(_recoveries(chosen, hits))
    assert [tuple(result.differences) for result in found[:3]] == [(), ("none",), ("none", "bias")]
    by_key = {(result.method, result.target, result.recovery): result for result in found}
    for result in found:
        for other, difference in result.differences.items():
            base = by_key[result.method, result.target, other].accuracy.value
            assert np.isclose(difference.value, result.accuracy.value - base)
            assert difference.low <= difference.value <= difference.high
    comparison = Comparison({}, (), (), found, ())
    assert Comparison.from_dict(comparison.as_dict()) == comparison
    header, _, *rows = _recovery_parts(comparison)[-1].splitlines()
    assert header == "| method | pruned | none | bias | refit | bias − none | refit − none | refit − bias |"
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| flap", "50%"], ["| lop-search", "50%"], ["| flap", "60%"], ["| lop-search", "60%"]
    ]  # fmt: skip
