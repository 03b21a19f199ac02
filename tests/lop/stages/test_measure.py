"""`lop measure`: what it writes, and that it goes on where it was stopped."""

import json
import shutil
from pathlib import Path

import pytest

from lop.model.find import assets
from lop.report.qualities import plot_qualities, qualities_table
from lop.run.config import load_config
from lop.run.qualities import read_qualities
from lop.run.run import Run
from lop.stages import measure
from lop.stages.local import Local
from lop.stages.measure import measure_stage

# Older ones do not unpack when they load.
pytest.importorskip("transformers", minversion="5.24")

FEW = ("measure.ratios=[0.0, 0.3]", "measure.bits=[16, 4]", "recovery=none")


def test_pairs_are_measured_once_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(assets() / "run", folder)
    few = Run(load_config(folder / "config.yaml", [*FEW[:1], "measure.bits=[16]", FEW[2]]), folder)
    first = measure_stage(few, Local())
    assert [(quality.ratio, quality.bits) for quality in first.measured] == [(0.0, 16), (0.3, 16)]
    assert abs(first.measured[0].divergence) < 1e-4 < first.measured[1].divergence
    made = []
    made_by = measure.quantised_elastic
    monkeypatch.setattr(measure, "quantised_elastic", lambda *a, **k: made.append(a[1]) or made_by(*a, **k))
    more = Run(load_config(folder / "config.yaml", FEW), folder)
    second = measure_stage(more, Local())
    assert len(made) == 2
    assert second.measured[:2] == first.measured
    assert second.measured[2].divergence > first.measured[0].divergence
    assert second.measured[2].bytes < first.measured[1].bytes
    assert read_qualities(more) == second
    assert json.loads((folder / "seconds.json").read_text())["measure"] > 0
    plot_qualities(second, folder / "qualities.png")
    assert (folder / "qualities.png").stat().st_size > 10_000
    assert qualities_table(second).row_count == 2
    measure_stage(more, Local())
    assert len(made) == 2
