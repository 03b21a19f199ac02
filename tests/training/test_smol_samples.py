import importlib.util
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lop.model.samples import LETTERS, SampleSets, load_sample_sets

ASSETS = Path(__file__).parents[2] / "lop" / "assets"
SOURCES = (
    "/usr/share/wordnet/data.noun",
    "/usr/share/dict/scowl/english-words.35",
    "/usr/share/doc/debian-handbook/html/en-US/apt.html",
    "/usr/bin/bible",
    "/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
    "/usr/share/doc/jargon-text/jargon.txt.gz",
)
has_packages = all(importlib.util.find_spec(name) for name in ("countryinfo", "pycountry"))
needs_packages = pytest.mark.skipif(not has_packages, reason="the extra `training` is not installed")
needs_sources = pytest.mark.skipif(
    not has_packages or not all(Path(path).exists() for path in SOURCES),
    reason="the sources of the samples are not installed",
)


@pytest.fixture(scope="module")
def sets() -> SampleSets:
    return load_sample_sets(ASSETS / "smol" / "samples")  # Checks rows, and that the sets share nothing.


def test_the_sets_hold_what_they_promise(sets: SampleSets) -> None:
    for samples, least in ((sets.calibration, 500), (sets.reward, 1000), (sets.test, 3000)):
        text = [sample for sample in samples if not sample.image]
        assert len(text) >= least
        assert {sample.form for sample in text} == {"choice", "word", "text"}
        letters = Counter(sample.answer for sample in text if sample.form == "choice")
        # No letter is worth guessing: four standard deviations of fair draws.
        assert (
            max(abs(count - letters.total() / 4) for count in letters.values()) < 4 * (letters.total() * 3 / 16) ** 0.5
        )
        closed = Counter((sample.kind, sample.answer) for sample in samples if sample.form == "yes_no")
        assert all(closed[kind, "yes"] == closed[kind, "no"] for kind, _ in closed)
        for sample in samples:
            assert len({option.lower() for option in sample.options}) == len(sample.options)
            assert sample.form != "choice" or sample.answer in LETTERS[: len(sample.options)]
            if sample.is_prose and sample.kind != "example":
                assert 50 <= len(sample.answer.split()) <= 180
    assert sum(file.stat().st_size for file in (ASSETS / "smol" / "samples").iterdir()) < 12 * 2**20


def test_images_stay_in_the_sets_that_the_tower_knows(sets: SampleSets) -> None:
    tiny = load_sample_sets(ASSETS / "tiny" / "samples")
    for name in ("calibration", "reward", "test"):
        mine = {sample.image_key for sample in getattr(sets, name) if sample.image}
        assert mine
        assert mine <= {sample.image_key for sample in getattr(tiny, name)}


@needs_packages
def test_no_question_spells_its_answer(sets: SampleSets) -> None:
    from training.smol.knowledge import gives_away

    assert gives_away("What is the capital of Tunisia?", "Tunis")
    assert gives_away("A sailboat is a kind of what?", "boat")
    for sample in (*sets.calibration, *sets.reward, *sets.test):
        if not sample.image and sample.form == "word":
            assert not gives_away(sample.question, sample.answer), sample.question


@needs_packages
@given(st.sets(st.integers(0, 500), min_size=40), st.sets(st.integers(0, 500)))
def test_dealing_is_even_and_one_source_does_not_move_another(words: set[int], countries: set[int]) -> None:
    from training.smol.make_samples import deal

    groups = [f"wordnet/{word}" for word in words]
    dealt = deal(groups)
    shares = Counter(dealt.values())
    assert abs(shares["test"] - len(words) / 2) <= 4
    assert min(shares[name] for name in ("calibration", "reward", "training")) >= len(words) // 8
    together = deal([*(f"country/{country}" for country in countries), *reversed(groups)])
    assert {group: together[group] for group in groups} == dealt


@needs_packages
@needs_sources
def test_the_shipped_sets_are_made_again(sets: SampleSets) -> None:
    from training.smol.make_samples import make_sets

    assert make_sets() == sets


@needs_packages
@needs_sources
def test_what_is_learnt_from_has_no_group_of_reward_or_test(sets: SampleSets) -> None:
    from training.smol.lessons import make_lessons
    from training.smol.make_samples import Dealt

    lessons = tuple(make_lessons())
    SampleSets((*sets.calibration, *lessons), sets.reward, sets.test)  # Checks it.
    assert len(lessons) == len(set(lessons)) > 7000
    assert not set(lessons) & set(sets.calibration)
    held = {sample.image_id for sample in (*sets.reward, *sets.test) if not sample.image}
    assert not held & {fact.group for fact in Dealt.all().facts_of("training")}
