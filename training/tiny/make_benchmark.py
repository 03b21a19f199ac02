"""Makes the embedded benchmark from the test samples' images: their labels and facts, and no image beside them.

python -m training.tiny.make_benchmark [--samples FOLDER]
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lop.model.samples import LETTERS, Sample, load_samples
from lop.report.benchmark import FOLDER, NEGATIVES, Question
from training.tiny.facts import countries
from training.tiny.images import Picture, decode, products, shapes
from training.tiny.questions import KINDS, MANY_RIGHT, WORDINGS, ask, is_negated, values_of

_MMBENCH_QUESTIONS = 360
_MME_PAIRS = {
    "perception/colour": 80,
    "perception/shape": 80,
    "perception/product": 80,
    "perception/country": 80,
    "reasoning/negation": 160,
    "reasoning/two_steps": 160,
}
_POPE_IMAGES = {"colour": 70, "shape": 70, "product": 70, "country": 140}
_MMMU_QUESTIONS = 840
_SUBJECTS = {
    "geography": ("capital", "continent", "subregion", "neighbour"),
    "society": ("language", "demonym", "german"),
    "codes": ("currency", "calling_code", "code3"),
}
_SOURCES = {"colour": "easy-vqa", "shape": "easy-vqa", "product": "fashion-mnist", "country": "flags"}
_POPULAR_SHARE = 1 / 3
_ADVERSARIES = 3
_TRIES = 200


@dataclass(frozen=True)
class _Pool:
    """The test pictures of each source, in random order, drawn in turns."""

    pictures: dict[str, list[Picture]]

    def take(self, source: str, count: int, random: np.random.Generator) -> list[Picture]:
        """Pictures of a source, each as often as the others."""
        mine = self.pictures[source]
        rounds = [random.permutation(len(mine)) for _ in range(-(-count // len(mine)))]
        return [mine[index] for index in np.concatenate(rounds)[:count]]


def main() -> None:
    """Writes one file a task into the `benchmark` folder beside the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default=Path("lop/assets/tiny/samples"))
    options = parser.parse_args()
    pool = _Pool(_test_pictures(load_samples(options.samples / "test.parquet")))
    folder = options.samples / FOLDER
    folder.mkdir(exist_ok=True)
    for number, (task, make) in enumerate({"mmbench": _mmbench, "mme": _mme, "mmmu": _mmmu, "pope": _pope}.items()):
        questions = list(make(pool, np.random.default_rng([2027, number])))
        _write(questions, folder / f"{task}.parquet")
        print(task, len(questions), dict(Counter(question.part for question in questions)))


def _test_pictures(samples: Sequence[Sample]) -> dict[str, list[Picture]]:
    """The pictures behind the test samples, with what is to be seen in them, by source."""
    labels = {picture.image_id: picture.labels for picture in (*shapes("test"), *products("test"))}
    names = {country.code: country.name for country in countries()}
    found: dict[str, dict[str, Picture]] = {source: {} for source in KINDS}
    for sample in samples:
        mine = labels.get(sample.image_id) or (("country", names[sample.image_id.split("/")[1]]),)
        found[sample.source][sample.image_id] = Picture(sample.image, sample.image_id, sample.source, mine)
    return {source: list(pictures.values()) for source, pictures in found.items()}


def _mmbench(pool: _Pool, random: np.random.Generator) -> Iterator[Question]:
    """Multiple choice of every kind in turn, each question in every rotation of its options."""
    turns = [(source, kind) for source, kinds in KINDS.items() for kind in kinds]
    for number in range(_MMBENCH_QUESTIONS):
        source, kind = turns[number % len(turns)]
        sample = _asked(pool, source, kind, "choice", random)
        right = sample.options[LETTERS.index(sample.answer)]
        for turn in range(len(sample.options)):
            options = (*sample.options[turn:], *sample.options[:turn])
            rotated = replace(sample, options=options, answer=LETTERS[options.index(right)])
            yield Question("mmbench", f"{number:04}", str(turn), rotated)


def _mme(pool: _Pool, random: np.random.Generator) -> Iterator[Question]:
    """Two questions of one wording to an image, one right and one wrong."""
    for part, count in _MME_PAIRS.items():
        half, name = part.split("/")
        for number in range(count):
            if half == "perception":
                source, kinds = _SOURCES[name], [name]
            elif name == "two_steps":
                source, kinds = "flags", ["neighbour_capital"]
            else:
                source = str(random.choice(list(KINDS), p=[0.15, 0.15, 0.7]))
                kinds = [kind for kind in KINDS[source] if kind not in MANY_RIGHT]
            kind = str(random.choice(kinds))
            for sample in _pair(pool, source, kind, name == "negation", random):
                yield Question("mme", f"{name}/{number:04}", part, sample)


def _pair(pool: _Pool, source: str, kind: str, negated: bool, random: np.random.Generator) -> tuple[Sample, Sample]:
    while True:
        (picture,) = pool.take(source, 1, random)
        answers: dict[str, Sample] = {}
        wordings = [w for w in WORDINGS[kind][1] if is_negated(w) == negated]
        wording = str(random.choice(wordings))
        for _ in range(_TRIES):
            sample = ask(picture, kind, "yes_no", random)
            if sample is None:
                break
            if _fits(sample.question, wording, WORDINGS[kind][1]):
                answers.setdefault(sample.answer, sample)
            if len(answers) == 2:
                return answers["yes"], answers["no"]


def _fits(question: str, wording: str, wordings: Sequence[str]) -> bool:
    """Whether a question has this wording ("Is the capital not {}?" also fits "Is the capital {}?")."""
    fitting = [w for w in wordings if all(map(question.__contains__, w.split("{}")))]
    return max(fitting, key=len) == wording


def _mmmu(pool: _Pool, random: np.random.Generator) -> Iterator[Question]:
    """What must be known of a country whose flag is seen: by choice and in a word, in turn."""
    turns = [(subject, kind) for subject, kinds in _SUBJECTS.items() for kind in kinds]
    for number in range(_MMMU_QUESTIONS):
        subject, kind = turns[number % len(turns)]
        form = "choice" if kind in MANY_RIGHT or number // len(turns) % 2 else "word"
        yield Question("mmmu", f"{number:04}", subject, _asked(pool, "flags", kind, form, random))


def _asked(pool: _Pool, source: str, kind: str, form: str, random: np.random.Generator) -> Sample:
    sample = None
    while sample is None:
        (picture,) = pool.take(source, 1, random)
        sample = ask(picture, kind, form, random)
    return sample


def _pope(pool: _Pool, random: np.random.Generator) -> Iterator[Question]:
    """Is it there? One yes and one no to an image, the no with a random, a popular or an adversarial value.

    Popular are the values most frequent in the test images; adversarial are those whose images look most alike, by the
    mean of their pixels: an image holds one thing, so there is nothing that occurs together with it.
    """
    for kind, count in _POPE_IMAGES.items():
        pictures = pool.pictures[_SOURCES[kind]]
        counts = Counter(picture[kind] for picture in pictures)
        popular = [value for value, _ in counts.most_common(max(2, round(_POPULAR_SHARE * len(counts))))]
        alike = _look_alikes(pictures, kind)
        wordings = [w for w in WORDINGS[kind][1] if not is_negated(w)]
        for number, picture in enumerate(pool.take(_SOURCES[kind], count, random)):
            right = picture[kind]
            wording = str(random.choice(wordings))
            wrong = {
                "random": [value for value in values_of(kind) if value != right],
                "popular": [value for value in popular if value != right],
                "adversarial": alike[right],
            }
            for negatives in NEGATIVES:
                for value, answer in ((right, "yes"), (str(random.choice(wrong[negatives])), "no")):
                    sample = Sample(
                        picture.image,
                        picture.image_id,
                        picture.source,
                        kind,
                        "yes_no",
                        wording.format(value),
                        (),
                        answer,
                    )
                    yield Question("pope", f"{kind}/{number:04}", negatives, sample)


def _look_alikes(pictures: Sequence[Picture], kind: str) -> dict[str, list[str]]:
    """For each value the others whose mean images are nearest."""
    pixels: dict[str, list[np.ndarray]] = {}
    for picture in pictures:
        pixels.setdefault(picture[kind], []).append(decode(picture.image).astype(np.float32))
    means = {value: np.mean(images, axis=0) for value, images in pixels.items()}

    def distance(one: str, other: str) -> float:
        return float(np.abs(means[one] - means[other]).mean())

    return {
        value: sorted((other for other in means if other != value), key=lambda other: distance(value, other))[
            :_ADVERSARIES
        ]
        for value in means
    }


def _write(questions: Sequence[Question], path: Path) -> None:
    rows = [{**asdict(question.sample), "group": question.group, "part": question.part} for question in questions]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd", dictionary_pagesize_limit=64 * 2**20)


if __name__ == "__main__":
    main()
