from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lop.errors import LopError
from lop.models import assets
from lop.samples import LETTERS, Sample, SampleSets, fingerprint_samples, load_sample_sets, load_samples, prompt_text

SAMPLE = Sample(b"png", "set/1", "set", "colour", "choice", "What color?", ("red", "blue"), "B")


def test_the_embedded_sets_hold_what_they_promise(samples: SampleSets) -> None:
    assert len(samples.calibration) >= 500
    assert len(samples.reward) >= 500
    assert len(samples.test) >= 3000
    for sample in samples.test:
        if sample.form == "choice":
            assert sample.answer in LETTERS[: len(sample.options)]
            assert len(set(sample.options)) == len(sample.options)
    answers = Counter((sample.kind, sample.answer) for sample in samples.test if sample.form == "yes_no")
    for kind in {kind for kind, _ in answers}:
        assert abs(answers[kind, "yes"] - answers[kind, "no"]) <= 6
    assert sum(file.stat().st_size for file in (assets() / "samples").iterdir()) < 10 * 2**20


def test_an_image_in_two_sets_is_named() -> None:
    other = replace(SAMPLE, image=b"other", image_id="set/2")
    third = replace(SAMPLE, image=b"third", image_id="set/3")
    SampleSets((SAMPLE,), (other,), (third,))
    with pytest.raises(LopError, match="set/1 is in both the calibration and the test"):
        SampleSets((SAMPLE,), (other,), (replace(third, image=SAMPLE.image, image_id="set/1"),))
    with pytest.raises(LopError, match="in both the reward and the test"):
        SampleSets((SAMPLE,), (other,), (replace(third, image=other.image),))
    with pytest.raises(LopError, match="no reward samples"):
        SampleSets((SAMPLE,), (), (third,))


def test_prompts_list_the_options() -> None:
    assert prompt_text(SAMPLE) == "What color?\nA. red\nB. blue"
    assert prompt_text(replace(SAMPLE, form="word", options=())) == "What color?"


def test_fingerprints_tell_samples_apart() -> None:
    assert fingerprint_samples([SAMPLE]) == fingerprint_samples([replace(SAMPLE)])
    for change in ({"answer": "A"}, {"image": b"x"}, {"question": "?"}, {"options": ("blue", "red")}):
        assert fingerprint_samples([SAMPLE]) != fingerprint_samples([replace(SAMPLE, **change)])


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(LopError, match=r"calibration\.parquet is missing"):
        load_sample_sets(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(LopError, match="not a readable sample file"):
        load_samples(tmp_path / "x.parquet")
    with pytest.raises(LopError, match="form 'essay'"):
        replace(SAMPLE, form="essay")
    with pytest.raises(LopError, match="0 options do not go with"):
        replace(SAMPLE, options=())
