import re
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lop.errors import LopError
from lop.model.find import assets
from lop.model.samples import (
    LETTERS,
    Sample,
    SampleSets,
    decode_image,
    fingerprint_samples,
    image_size,
    load_sample_sets,
    load_samples,
    prompt_text,
)
from lop.run.config import find_config, load_config
from lop.run.run import Run
from lop.stages.calibrate import calibrate_stage

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


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    """A Parquet file of rows that lack nothing but what they are to lack."""
    whole = {"image": PNG, "form": "word", "question": "What is this?", "options": None, "answer": "cat"}
    pq.write_table(pa.Table.from_pylist([{**whole, **row} for row in rows]), path)
    return path


def encode_picture(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG = encode_picture(Image.new("RGB", (8, 6), "red"))
CHOICE: dict[str, Any] = {"form": "choice", "options": ["red", "blue"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"form": "essay"}, "column form: form 'essay'"),
        ({"question": " "}, "column question: it is empty"),
        ({"question": None}, "column question: it is empty"),
        ({"question": "<image>\nWhat is this?"}, "column question: '<image>' is markup"),
        ({"answer": "<|im_end|>"}, "column answer: '<|im_end|>' is markup"),
        ({"answer": ""}, "column answer: '' is empty"),
        ({"answer": None}, "column answer: '' is empty"),
        ({"answer": "cat "}, "column answer: 'cat ' has spaces"),
        ({"answer": 1.5}, "column answer: 1.5 is not text"),
        ({"options": ["a", "b"]}, "column options: 2 options do not go with form 'word'"),
        ({"form": "yes_no", "answer": "maybe"}, "column answer: 'maybe' is not yes or no"),
        ({"form": "yes_no", "answer": 1}, "column answer: 1 is a number"),
        ({**CHOICE, "answer": "A."}, "column answer: 'A.' is no option's letter: write A"),
        ({**CHOICE, "answer": "b"}, "column answer: 'b' is no option's letter: write B"),
        ({**CHOICE, "answer": "blue"}, "column answer: 'blue' is no option's letter: write B"),
        ({**CHOICE, "answer": "C"}, "column answer: 'C' is no option's letter: write one of A, B"),
        ({**CHOICE, "answer": 2}, "column answer: there is no option 2: options are counted from 0 to 1"),
        ({**CHOICE, "answer": -1}, "column answer: there is no option -1"),
        ({"form": "choice", "answer": "A", "options": ["red"]}, "column options: 1 options do not go"),
        ({"form": "choice", "answer": "A", "options": ["red", ""]}, "column options: option B is empty"),
        ({"form": "choice", "answer": "A", "options": ["red", "red"]}, "column options: 'red' stands there twice"),
        ({"form": "choice", "answer": "A", "options": "red or blue"}, "column options: 'red or blue' is not a list"),
        ({"form": "choice", "answer": "A", "options": list("abcdefghi")}, "column options: 9 options"),
        ({"image": b"GIF8"}, "column image: it cannot be decoded"),
        ({"image": PNG[:-30]}, "column image: it cannot be decoded"),
        ({"image": encode_picture(Image.new("F", (4, 4)), "TIFF")}, "column image: .*floating-point"),
        ({"image": encode_picture(Image.new("RGB", (1, 300)))}, "column image: 1×300 pixels"),
        ({"image": "cat.png"}, "column image: 'cat.png' is not to be read beside"),
        ({"image": {"bytes": None, "path": "cat.png"}}, "column image: 'cat.png' is not to be read beside"),
        ({"image": [PNG, PNG]}, "column image: a list is neither"),
        ({"form": "text"}, "column image: form 'text' is prose"),
        ({"form": "text", "image": None, "answer": " "}, "column answer: ' ' is empty"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_rows(tmp_path / "reward.parquet", row)
    with pytest.raises(LopError, match=re.escape(message).replace(r"\.\*", ".*")) as raised:
        load_samples(path)
    assert str(raised.value).startswith(f"{path}, row 0 (counted from 0), column ")
    assert "\n" not in str(raised.value)


def test_the_row_is_counted_and_a_missing_column_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.parquet", {}, {"question": "And this?"}, {"answer": "dog "})
    with pytest.raises(LopError, match=r"row 2 \(counted from 0\), column answer"):
        load_samples(path)
    pq.write_table(pq.read_table(path).drop_columns("answer"), path)
    with pytest.raises(LopError, match="has no column 'answer', only"):
        load_samples(path)


def test_what_people_have_is_read(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cat.png").write_bytes(PNG)
    forms = [
        {"image": PNG},
        {"image": {"bytes": PNG, "path": None}},
        {"image": {"bytes": PNG, "path": "elsewhere.png"}},
        {"image": {"bytes": None, "path": "images/cat.png"}},
        {"image": "images/cat.png"},
    ]
    for row in forms:
        (sample,) = load_samples(write_rows(tmp_path / "x.parquet", row))
        assert sample.image == PNG
        assert sample.image_id
    for image in (None, b"", "", {"bytes": None, "path": None}):
        (sample,) = load_samples(write_rows(tmp_path / "x.parquet", {"image": image}))
        assert sample.image == b""
    answers = [("A", "A"), (0, "A"), (1, "B")]
    for options in (["red", "blue"], "['red', 'blue']", '["red", "blue"]'):
        for given, expected in answers:
            row = {"form": "choice", "options": options, "answer": given}
            (sample,) = load_samples(write_rows(tmp_path / "x.parquet", row))
            assert (sample.options, sample.answer) == (("red", "blue"), expected)
    (sample,) = load_samples(write_rows(tmp_path / "x.parquet", {"question": "How many?", "answer": 3}))
    assert sample.answer == "3"


def test_samples_are_checked_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("calibration", "reward", "test"):
        write_rows(tmp_path / f"{name}.parquet", {"answer": ""} if name == "test" else {})
    monkeypatch.setattr("lop.stages.calibrate.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    config = load_config(find_config("tiny")).model_copy(update={"samples": str(tmp_path)})
    with pytest.raises(LopError, match=r"test\.parquet, row 0"):
        calibrate_stage(Run(config, tmp_path / "run"))


def test_pictures_are_seen_as_viewers_show_them() -> None:
    # Black above, white below; orientation 6: the camera was turned, the left side is up.
    halves = np.zeros((16, 8, 3), np.uint8)
    halves[8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode_picture(Image.fromarray(halves), "JPEG", quality=95, exif=exif)
    seen = np.asarray(decode_image(turned))
    assert seen.shape == (8, 16, 3)
    assert image_size(turned) == (16, 8)
    assert seen[:, :6].mean() > 240
    assert seen[:, -6:].mean() < 15

    for clear in (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), Image.new("LA", (4, 4), (0, 0))):
        assert np.asarray(decode_image(encode_picture(clear))).min() == 255
    half = decode_image(encode_picture(Image.new("RGBA", (4, 4), (0, 0, 0, 128))))
    assert half.getpixel((0, 0)) == (127, 127, 127)

    ramp = np.linspace(0, 0xFFFF, 64, dtype=np.uint16).reshape(8, 8)
    gray = np.asarray(decode_image(encode_picture(Image.fromarray(ramp))))
    np.testing.assert_array_equal(gray, np.repeat((ramp >> 8)[..., None], 3, axis=2))


def test_text_alone_is_kept_apart_by_group_and_by_words() -> None:
    first = replace(SAMPLE, image=b"", image_id="word/1")
    other = replace(SAMPLE, image=b"", image_id="word/2", question="What colour?")
    third = replace(SAMPLE, image=b"", image_id="word/3", question="Which colour?")
    SampleSets((first,), (other,), (third,))
    with pytest.raises(LopError, match="text word/1 is in both the calibration and the test"):
        SampleSets((first,), (other,), (replace(third, image_id="word/1"),))
    with pytest.raises(LopError, match="in both the calibration and the test"):
        SampleSets((first,), (other,), (replace(first, image_id="word/4"),))
    assert fingerprint_samples([first]) != fingerprint_samples([SAMPLE])


def test_fingerprints_of_what_ships_stay(samples: SampleSets) -> None:
    found = [fingerprint_samples(getattr(samples, name)) for name in ("calibration", "reward", "test")]
    assert found == ["c352805896af7829", "57a2901abd8e2f45", "5d8951e8e494e73f"]
    assert fingerprint_samples(samples.reward, max_pixels=4096) != found[1]
