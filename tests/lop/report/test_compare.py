"""The table of recoveries: paired differences, kept and shown."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from lop.model.find import assets
from lop.model.samples import SampleSets
from lop.report.compare import Comparison, _recoveries, compare
from lop.report.report import _recovery_parts
from lop.run.config import load_config
from lop.run.run import Run


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


@pytest.mark.parametrize(
    ("scored", "told"),
    [("none", {"uniform": "none", "flap": "bias"}), ("refit", dict.fromkeys(("uniform", "flap", "shortgpt"), "refit"))],
)
def test_all_methods_have_the_recovery_that_the_search_scored_with(
    tmp_path: Path, scored: str, told: dict[str, str]
) -> None:
    shutil.copytree(assets() / "run", tmp_path / "run")
    settings = [
        f"search.recovery={scored}",
        f"compare={{targets: [0.5], recovery_targets: [0.5], methods: [{', '.join(told)}], limit: 60}}",
    ]
    run = Run(load_config(assets() / "run" / "config.yaml", settings), tmp_path / "run")
    found = compare(run, progress=False)
    by_recovery = {(each.method, each.recovery): each.accuracy for each in found.recoveries}
    own = {average.method: average.accuracy for average in found.averages if average.method != "dense"}
    assert own == {method: by_recovery[method, recovery] for method, recovery in told.items()}
