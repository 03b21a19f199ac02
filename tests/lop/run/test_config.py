from pathlib import Path

import pytest

from lop.checkpoint.recoveries import RECOVERIES
from lop.errors import LopError
from lop.run.config import Config, find_config, load_config, save_config
from lop.run.settings import Targets

CONFIGS = sorted(find_config("tiny").parent.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_survive_a_file(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


def test_targets_are_as_they_print() -> None:
    ratios = Targets(first=0.05, last=0.7, step=0.025).ratios
    assert len(ratios) == 27
    assert ratios[:3] == (0.05, 0.075, 0.1)
    assert ratios[-1] == 0.7


def test_overrides_reach_into_groups(tmp_path: Path) -> None:
    config = load_config(find_config("tiny"), ["search.simulations=7", "search.roots=[flap]"], model="other")
    assert (config.search.simulations, config.search.roots, config.model) == (7, ("flap",), "other")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.simulation=7", "search.simulation: there is no such setting"),
        ("search.simulations=many", "search.simulations: .*'many'"),
        ("search.simulations=7.5", "search.simulations"),
        ("seed=true", "seed"),
        ("granularity=0", "granularity: .*not 0"),
        ("max_ratio=1", "max_ratio"),
        ("search.roots=[oracle]", "search.roots.0"),
        ("search.targets={first: 0.5, last: 0.2, step: 0.1}", "must not be below first"),
        ("model=2026-01-01", "not a number, text or list"),
        ("search", "write key=value"),
        ("seed.more=1", "not a group"),
        ("seed=[", "not a YAML value"),
    ],
)
def test_bad_settings_are_named_in_one_line(override: str, message: str) -> None:
    with pytest.raises(LopError, match=message) as raised:
        load_config(find_config("tiny"), [override])
    assert "\n" not in str(raised.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    for text, message in (("{", "not YAML"), ("- 1", "not a mapping"), ("model: tiny", "search: Field required")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(LopError, match=message):
            load_config(tmp_path / "c.yaml")
    with pytest.raises(LopError, match="is missing"):
        load_config(tmp_path / "none.yaml")


def test_configs_are_frozen() -> None:
    config: Config = load_config(find_config("tiny"))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_a_recovery_that_trains_is_scored_as_what_it_starts_from() -> None:
    settings = ["search.recovery=null"]
    scored = {name: load_config(find_config("tiny"), settings, recovery=name).scored_recovery for name in RECOVERIES}
    assert scored == {"none": "none", "bias": "bias", "refit": "refit", "distil": "refit"}
    for setting in ("search.recovery=distil", "compare.recoveries=[refit, distil]"):
        with pytest.raises(LopError, match=r"recover.*'distil'"):
            load_config(find_config("tiny"), [setting])
