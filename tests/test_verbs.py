"""`import lop` as a person uses it: light, and the same answers as the command line's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lop
from lop.model.find import assets
from tests.commands import lop_command


def test_importing_lop_brings_in_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "ray", "transformers", "pydantic", "pyarrow")
    code = f"import lop, sys; dir(lop); print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_all_that_is_offered_is_there() -> None:
    assert set(lop.__all__) <= set(dir(lop))
    for name in lop.__all__:
        assert getattr(lop, name).__doc__
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = lop.nothing_of_the_kind
    assert lop_command("--version").stdout == f"lop {lop.__version__}\n"


@pytest.mark.parametrize("target", [{"ratio": 0.3}, {"parameters": "2M"}, {"bytes": 4_000_000}, {"bytes": "3.9MB"}])
def test_a_prediction_is_the_command_lines(target: dict[str, float | str]) -> None:
    ((name, value),) = target.items()
    option = "--target" if name == "ratio" else f"--{name}"
    done = lop_command("predict", option, str(value), "--json")
    assert lop.predict("tiny", **target) == json.loads(done.stdout)  # type: ignore[arg-type]
    assert lop.predict(run=assets() / "run", **target) == lop.predict(**target)  # type: ignore[arg-type]


def test_a_checkpoint_is_pruned_inspected_and_opened(tmp_path: Path) -> None:
    steps = []
    manifest = lop.prune(
        "tiny",
        tmp_path / "small",
        bytes="3.9MB",
        format="padded",
        recovery="none",
        progress=lambda step, done, total: steps.append((step, done == total)),
    )
    found = lop.inspect(tmp_path / "small")
    assert list(found.widths) == manifest["widths"]
    assert found.bytes <= 3_900_000
    assert not found.damage
    assert ("export", True) in steps
    assert sum(p.numel() for p in lop.load(tmp_path / "small").parameters()) == found.parameters
    assert lop.inspect("tiny").format == "dense"


def test_what_cannot_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lop.LopError, match="exactly one target"):
        lop.predict("tiny")
    with pytest.raises(lop.LopError, match="exactly one target"):
        lop.predict("tiny", ratio=0.3, bytes="4MiB")
    with pytest.raises(lop.LopError, match="'4 apples' is not a number of bytes"):
        lop.prune("tiny", tmp_path / "small", bytes="4 apples")
    with pytest.raises(lop.LopError, match="padded"):
        lop.prune("tiny", tmp_path / "small", ratio=0.3, format="padded", recovery="bias")
    assert list(tmp_path.iterdir()) == []
