"""Questions, with an image or without: what calibration, reward and test are made of."""

import ast
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from lop.errors import LopError, first_line
from lop.fingerprint import fingerprint

FORMS = ("choice", "yes_no", "word")
PROSE = "text"
LETTERS = "ABCDEFGH"
_YES_NO = ("yes", "no", "Yes", "No")
_NEEDED = ("form", "question", "answer")
_OPTIONAL = ("image", "image_id", "source", "kind", "options")
# What would change the prompt's structure instead of being read: Qwen's own tokens, and where others put the image.
_MARKUP = re.compile(r"<\|\w+\|>|<image>")
_LONGEST = 200  # times as long as wide: Qwen2.5-VL's processor refuses more.


@dataclass(frozen=True)
class Sample:
    """One question, about an image or without one; or a piece of prose.

    Attributes:
        image: the encoded image file; empty if there is none.
        image_id: where the image comes from; without an image, the group that the sample belongs to (a word, a fact, a
            passage). Two sets of samples share none.
        source: the data set.
        kind: what the question asks about.
        form: `choice` (the answer is an option's letter), `yes_no`, `word`, or `text`: prose, where every token of the
            answer is scored as the continuation of the question, outside any chat, and nothing is right or wrong.
        question: the text, without the options; may be empty for prose.
        options: the options in the order of their letters; empty unless the form is `choice`.
        answer: the right answer, as the model must write it.

    Raises:
        LopError: a value does not go with the form; names the column, and what would be right.
    """

    image: bytes
    image_id: str
    source: str
    kind: str
    form: str
    question: str
    options: tuple[str, ...]
    answer: str

    def __post_init__(self) -> None:
        _check_form(self)
        _check_options(self)
        _check_answer(self)
        if not self.question.strip() and not self.is_prose:
            raise LopError(f"column question: it is empty, and only form {PROSE!r} may go without")
        for column, texts in (("question", [self.question]), ("options", self.options), ("answer", [self.answer])):
            for found in filter(None, map(_MARKUP.search, texts)):
                raise LopError(f"column {column}: {found[0]!r} is markup, not text: leave it out, LOP puts the image")

    @property
    def is_prose(self) -> bool:
        """Whether the answer is prose, of which every token counts and none is right or wrong."""
        return self.form == PROSE

    @cached_property
    def image_key(self) -> str:
        """The SHA-256 of the image file; without an image, the group. Equal keys: the same image, or the same group."""
        return hashlib.sha256(self.image).hexdigest() if self.image else f"text:{self.image_id}"

    @property
    def keys(self) -> tuple[str, ...]:
        """What no two sets may share: the image (or group), its name, and without an image the text itself."""
        text = () if self.image else (f"words:{fingerprint([self.question, sorted(self.options), self.answer])}",)
        return (self.image_key, f"id:{self.image_id}", *text)


@dataclass(frozen=True)
class SampleSets:
    """The three disjoint sets of samples.

    Raises:
        LopError: an image, a group or a text stands in two of them, or one is empty.
    """

    calibration: tuple[Sample, ...]
    reward: tuple[Sample, ...]
    test: tuple[Sample, ...]

    def __post_init__(self) -> None:
        owner: dict[str, str] = {}
        for name in ("calibration", "reward", "test"):
            samples: tuple[Sample, ...] = getattr(self, name)
            if not samples:
                raise LopError(f"there are no {name} samples")
            for sample in samples:
                for key in sample.keys:
                    if owner.setdefault(key, name) != name:
                        what = "image" if sample.image else "text"
                        raise LopError(f"{what} {sample.image_id} is in both the {owner[key]} and the {name} samples")


def check_answers(samples: Sequence[Sample], what: str) -> None:
    """Checks that there is something to be right or wrong about.

    Args:
        what: what is to be counted, and in which samples; begins the message.

    Raises:
        LopError: all samples are prose.
    """
    if all(sample.is_prose for sample in samples):
        raise LopError(
            f"{what}: all of them are prose (form {PROSE!r}), which is never right or wrong: "
            f"add questions, or reward log_probability or divergence"
        )


def prompt_text(sample: Sample) -> str:
    """The question as the model reads it, options included."""
    return prompt_of(sample.question, sample.options)


def prompt_of(question: str, options: Sequence[str]) -> str:
    """A question and its options as the model reads them."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options))])


def decode_image(data: bytes) -> Image.Image:
    """A sample's picture as the processor takes it; see `as_seen`."""
    return as_seen(Image.open(BytesIO(data)))


def as_seen(image: Image.Image) -> Image.Image:
    """A picture in 8-bit RGB as a viewer shows it: upright (EXIF), on white where transparent, 16 bits cut to 8.

    Raises:
        ValueError: its values are floating-point numbers, or integers of more than 16 bits: no viewer's picture.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("its values have more than 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of a sample's picture as `decode_image` gives it, from the file's header alone."""
    image = Image.open(BytesIO(data))
    turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 swap the sides.
    return (image.height, image.width) if turned else image.size


def load_sample_sets(folder: Path) -> SampleSets:
    """Reads `calibration.parquet`, `reward.parquet` and `test.parquet` from a folder.

    Raises:
        LopError: a file is missing or damaged, a row is wrong, or the sets are not disjoint.
    """
    return SampleSets(*(load_samples(folder / f"{name}.parquet") for name in ("calibration", "reward", "test")))


def load_samples(path: Path) -> tuple[Sample, ...]:
    """Reads one Parquet file with the columns of `Sample`, and checks every row.

    Raises:
        LopError: the file is missing or damaged, a column is missing, or a row is wrong; names file, row and column.
    """
    try:
        there = pq.read_schema(path).names
        for column in _NEEDED:
            if column not in there:
                raise LopError(f"{path} has no column {column!r}, only {', '.join(there)}")
        rows = pq.read_table(path, columns=[name for name in (*_NEEDED, *_OPTIONAL) if name in there]).to_pylist()
    except FileNotFoundError:
        raise LopError(f"{path} is missing") from None
    except (pa.ArrowException, OSError) as error:
        raise LopError(f"{path} is not a readable sample file: {first_line(error)}") from None
    samples = []
    checked: dict[str, bytes] = {}
    for number, row in enumerate(rows):
        try:
            sample = sample_of(row, path.parent)
            if sample.image and sample.image_key not in checked:
                _check_image(sample.image)
        except LopError as error:
            raise LopError(f"{path}, row {number} (counted from 0), {error}") from None
        if sample.image:
            # One copy of an image that many questions are asked about.
            vars(sample)["image"] = checked.setdefault(sample.image_key, sample.image)
        samples.append(sample)
    return tuple(samples)


def sample_of(row: Mapping[str, Any], folder: Path) -> Sample:
    """One row as people have it: what stands for the same thing in other ways is put right, the rest refused.

    An image is bytes, a struct of `bytes` and `path` (Hugging Face's), or the path of a file, from `folder` on. The
    options may be one text that holds a list. The answer may be a number: for a choice the option's, from 0 on.

    Raises:
        LopError: a value is of another type, or does not go with the form; names the column.
    """
    image, place = _image_of(row.get("image"), folder)
    form = _text("form", row["form"])
    question = _text("question", row["question"])
    options = _options_of(row.get("options"))
    answer = _answer_of(row["answer"], form, options)
    name = _name(row.get("image_id")) or place
    if not name:
        name = hashlib.sha256(image).hexdigest()[:16] if image else fingerprint([question, list(options), answer])
    return Sample(image, name, _name(row.get("source")), _name(row.get("kind")), form, question, options, answer)


def fingerprint_samples(samples: Sequence[Sample], *, max_pixels: int | None = None) -> str:
    """A fingerprint of images, questions and answers, in order, and of the most pixels they are read with if set."""
    values: list[Any] = [[s.image_key, s.form, s.question, list(s.options), s.answer] for s in samples]
    return fingerprint(values if max_pixels is None else [values, max_pixels])


def _check_form(sample: Sample) -> None:
    if sample.form not in (*FORMS, PROSE):
        raise LopError(f"column form: form {sample.form!r} is not one of {', '.join((*FORMS, PROSE))}")
    if sample.is_prose and sample.image:
        raise LopError(f"column image: form {PROSE!r} is prose, and has no image")


def _check_options(sample: Sample) -> None:
    options = sample.options
    if sample.form != "choice":
        if options:
            raise LopError(
                f"column options: {len(options)} options do not go with form {sample.form!r}: leave it empty"
            )
        return
    if not 2 <= len(options) <= len(LETTERS):
        raise LopError(f"column options: {len(options)} options do not go with form 'choice': 2 to {len(LETTERS)} do")
    for index, option in enumerate(options):
        if not option.strip():
            raise LopError(f"column options: option {LETTERS[index]} is empty")
        if option in options[:index]:
            raise LopError(f"column options: {option!r} stands there twice: two letters would be right")


def _check_answer(sample: Sample) -> None:
    answer = sample.answer
    if not answer.strip():
        raise LopError(f"column answer: {answer!r} is empty: nothing could be scored")
    if sample.form == "choice" and answer not in _letters(sample.options):
        raise LopError(f"column answer: {answer!r} is no option's letter: {_right_letter(answer, sample.options)}")
    if sample.form == "yes_no" and answer not in _YES_NO:
        raise LopError(f"column answer: {answer!r} is not yes or no: write one of {', '.join(_YES_NO)}")
    if sample.form == "word" and answer != answer.strip():
        raise LopError(f"column answer: {answer!r} has spaces around it, which no model writes: {answer.strip()!r}")


def _letters(options: Sequence[str]) -> tuple[str, ...]:
    return tuple(LETTERS[: len(options)])


def _right_letter(answer: str, options: Sequence[str]) -> str:
    """What to write instead, as near as can be told."""
    bare = answer.strip().strip("().:").upper()
    if answer.strip() in options:
        return f"write {LETTERS[options.index(answer.strip())]}"
    return f"write {bare}" if bare in _letters(options) else f"write one of {', '.join(_letters(options))}"


def _check_image(data: bytes) -> None:
    try:
        image = Image.open(BytesIO(data))
        width, height = image.size
        image.draft("RGB", (width // 8, height // 8))  # A JPEG is decoded small, which is fast.
        image.load()
        if image.mode[0] in "IF":
            as_seen(image)  # Says if it is none that can be seen.
    except Exception as error:  # Each of Pillow's readers fails in its own way.
        raise LopError(f"column image: it cannot be decoded ({first_line(error)}): PNG, JPEG and WebP can") from None
    if max(width, height) > _LONGEST * min(width, height):
        raise LopError(
            f"column image: {width}×{height} pixels: the model takes none that is more than {_LONGEST} times as long "
            "as wide"
        )


def _image_of(value: Any, folder: Path) -> tuple[bytes, str]:
    """An image's bytes, and the path that they were read from; both empty if there is none."""
    data, place = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    if isinstance(data, str):
        data, place = None, data
    if data is not None and not isinstance(data, bytes):
        raise LopError(
            f"column image: a {type(data).__name__} is neither an image file's bytes, nor a struct of bytes and path, "
            "nor a path, nor empty"
        )
    if data or not place:
        return data or b"", ""
    try:
        return (folder / place).read_bytes(), place
    except (OSError, ValueError) as error:
        raise LopError(
            f"column image: {place!r} is not to be read beside the Parquet file: {first_line(error)}"
        ) from None


def _options_of(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) and value.strip():
        try:
            value = ast.literal_eval(value)  # Covers JSON's lists of texts and Python's.
        except (ValueError, SyntaxError):
            raise LopError(f"column options: {value!r} is not a list: write a list of texts") from None
    if not isinstance(value or (), list | tuple):
        raise LopError(f"column options: {value!r} is not a list of texts")
    return tuple(_text("options", str(v) if _is_integer(v) else v) for v in value or ())


def _answer_of(value: Any, form: str, options: Sequence[str]) -> str:
    if not _is_integer(value):
        return _text("answer", value)
    if form == "word":
        return str(value)
    if form != "choice":
        raise LopError(f"column answer: {value} is a number, which goes with 'word', and with 'choice' as an index")
    if not 0 <= value < min(len(options), len(LETTERS)):
        raise LopError(f"column answer: there is no option {value}: options are counted from 0 to {len(options) - 1}")
    return LETTERS[value]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(column: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise LopError(f"column {column}: {value!r} is not text")
    return value


def _name(value: Any) -> str:
    return "" if value is None else str(value)
