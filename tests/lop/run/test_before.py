"""Runs from before allocations were scored with recovery, moves guided and answers confirmed are what they were."""

from pathlib import Path

import pytest
import yaml

from lop.model.find import assets
from lop.run.config import find_config, load_config
from lop.run.results import read_search
from lop.run.run import Run


@pytest.fixture
def before() -> Path:
    """The config that the run which ships was saved with."""
    return assets() / "run" / "config.yaml"


def test_a_run_of_before_is_read_as_it_was_searched(before: Path) -> None:
    assert not {"method", "recovery", "confirm"} & yaml.safe_load(before.read_text())["search"].keys()
    run = Run(load_config(before), before.parent)
    assert (run.config.search.method, run.config.scored_recovery, run.config.search.confirm) == ("paper", "none", None)
    assert run.config.search.descends is None
    assert run.config.search.blends == 0
    assert read_search(run)  # Its fingerprints are those that it was made with.


def test_what_it_went_without_can_be_asked_for(before: Path) -> None:
    config = load_config(before, ["search.method=guided", "search.recovery=refit"])
    assert (config.search.method, config.scored_recovery) == ("guided", "refit")


def test_a_new_config_has_all_three() -> None:
    search = load_config(find_config("smol")).search
    assert search.method == "guided"
    assert search.confirm is not None
    assert load_config(find_config("smol")).scored_recovery == "refit"


def test_what_the_papers_search_does_not_do_is_not_in_its_fingerprint() -> None:
    search = load_config(find_config("tiny")).search
    assert search.method == "paper"
    assert search.blends > search.blended == 0
    assert not {"descent", "blends"} & search.recorded().keys()
    descends = ["search.descent={}"]
    assert "descent" not in load_config(find_config("tiny"), descends).search.recorded()
    assert "descent" in load_config(find_config("tiny"), [*descends, "search.method=guided"]).search.recorded()
