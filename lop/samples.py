"""Questions about images: what calibration, reward and test are made of."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lop.errors import LopError, first_line
from lop.fingerprint import fingerprint

FORMS = ("choice", "yes_no", "word")
LETTERS = "ABCDEFGH"
_COLUMNS = ("image", "image_id", "source", "kind", "form", "question", "options", "answer")


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Attributes:
        image: the encoded image file (PNG or JPEG).
        image_id: where the image comes from.
        source: the data set.
        kind: what the question asks about.
        form: `choice` (the answer is an option's letter), `yes_no` or `word`.
        question: the text, without the options.
        options: the options in the order of their letters; empty unless the form is `choice`.
        answer: the right answer, as the model must write it.
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
        if self.form not in FORMS:
            raise LopError(f"form {self.form!r} of {self.image_id} is not one of {', '.join(FORMS)}")
        if (self.form == "choice") != bool(self.options) or len(self.options) > len(LETTERS):
            raise LopError(f"{self.image_id}: {len(self.options)} options do not go with form {self.form!r}")

    @cached_property
    def image_key(self) -> str:
        """The SHA-256 of the image file: two samples with the same key show the same image."""
        return hashlib.sha256(self.image).hexdigest()


@dataclass(frozen=True)
class SampleSets:
    """The three disjoint sets of samples.

    Raises:
        LopError: an image stands in two of them, or one is empty.
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
                for key in (sample.image_key, f"id:{sample.image_id}"):
                    if owner.setdefault(key, name) != name:
                        raise LopError(f"image {sample.image_id} is in both the {owner[key]} and the {name} samples")


def prompt_text(sample: Sample) -> str:
    """The question as the model reads it, options included."""
    return prompt_of(sample.question, sample.options)


def prompt_of(question: str, options: Sequence[str]) -> str:
    """A question and its options as the model reads them."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options))])


def decode_image(data: bytes) -> Image.Image:
    """A sample's picture as the processor takes it."""
    return Image.open(BytesIO(data)).convert("RGB")


def load_sample_sets(folder: Path) -> SampleSets:
    """Reads `calibration.parquet`, `reward.parquet` and `test.parquet` from a folder.

    Raises:
        LopError: a file is missing or damaged, or the sets are not disjoint.
    """
    return SampleSets(*(load_samples(folder / f"{name}.parquet") for name in ("calibration", "reward", "test")))


def load_samples(path: Path) -> tuple[Sample, ...]:
    """Reads one Parquet file with the columns of `Sample`.

    Raises:
        LopError: the file is missing or damaged, or a column is.
    """
    try:
        rows = pq.read_table(path, columns=list(_COLUMNS)).to_pylist()
    except FileNotFoundError:
        raise LopError(f"{path} is missing") from None
    except (pa.ArrowException, OSError) as error:
        raise LopError(f"{path} is not a readable sample file: {first_line(error)}") from None
    return tuple(Sample(**{**row, "options": tuple(row["options"] or ())}) for row in rows)


def fingerprint_samples(samples: Sequence[Sample]) -> str:
    """A fingerprint of images, questions and answers, in order."""
    return fingerprint([[s.image_key, s.form, s.question, list(s.options), s.answer] for s in samples])
