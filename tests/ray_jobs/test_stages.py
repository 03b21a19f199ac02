"""A search on Ray actors gives what one process gives, bit for bit."""

import json
from pathlib import Path

import pytest

from lop.run.config import Config, find_config, load_config
from lop.run.run import Run
from lop.search.ledger import read_ledger
from lop.stages.calibrate import calibrate_stage
from lop.stages.local import Local
from lop.stages.search import search_stage
from ray_jobs.compute import OnRay

pytestmark = pytest.mark.usefixtures("ray_cluster")
SETTINGS = [
    *("search.targets={first: 0.3, last: 0.5, step: 0.1}", "search.evaluations=4", "search.simulations=6"),
    *("search.roots=[flap, sensitivity]", "search.sensitivity_levels=2"),
]


def searched(folder: Path, workers: int, settings: list[str]) -> tuple[dict[str, object], object]:
    config: Config = load_config(find_config("tiny"), [*SETTINGS, *settings], workers=workers)
    run = Run(config, folder)
    calibrate_stage(run, progress=False)
    search_stage(run, OnRay() if workers else Local(), progress=False)
    return json.loads(run.search_file.read_text()), sorted(map(str, read_ledger(run.ledger)))


RACED = ["search.racing={}", "search.reward=accuracy", "search.tie_breaker=margin"]
GUIDED = [
    *("search.method=guided", "search.recovery=refit", "search.confirm={share: 0.25, candidates: 2}"),
    *("search.racing={}", "search.reward=divergence", "search.evaluations=12", "search.simulations=16"),
    "search.roots=[flap]",
]


@pytest.mark.parametrize("settings", [[], RACED, GUIDED], ids=["plain", "raced", "guided"])
def test_a_search_on_actors_is_the_search_of_one_process(tmp_path: Path, settings: list[str]) -> None:
    alone = searched(tmp_path / "alone", 0, settings)
    assert searched(tmp_path / "fleet", 2, settings) == alone
    races = ["opponent" in entry for target in alone[0]["targets"] for entry in target["evaluations"]]  # type: ignore[attr-defined]
    assert any(races) == bool(settings)
    for target in alone[0]["targets"]:  # type: ignore[attr-defined]
        finalists = [entry["widths"] for entry in target.get("confirmed", [])]
        assert len(finalists) in ((2, 3) if settings is GUIDED else (0,))
        assert not finalists or target["best"]["widths"] in finalists
