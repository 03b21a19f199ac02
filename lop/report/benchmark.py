"""The embedded benchmark: four tasks, one for each kind of real benchmark, each scored as that one scores.

A task is a list of questions about test images. A response is what greedy generation writes; it is right if it is the
answer, case and outer spaces aside. `lop.plugins.lmms_lop` runs the same tasks under lmms-eval, with the metrics of
this file.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lop.errors import LopError
from lop.model.samples import Sample, SampleSets, fingerprint_samples, load_samples
from lop.storage.fingerprint import fingerprint

FOLDER = "benchmark"
TASKS = ("mmbench", "mme", "mmmu", "pope")
# What a table shows: a task, or one half of MME.
COLUMNS = ("mmbench", "mme_perception", "mme_reasoning", "mmmu", "pope")
NEGATIVES = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Question:
    """One question of a task.

    Attributes:
        task: one of `TASKS`.
        group: what is judged together: a question's rotations (mmbench), an image's pair (mme).
        part: where it counts: the rotation's number (mmbench), `perception/…` or `reasoning/…` (mme), the subject
            (mmmu), one of `NEGATIVES` (pope).
        sample: the question itself.
    """

    task: str
    group: str
    part: str
    sample: Sample


@dataclass(frozen=True)
class Verdict:
    """One question's place, right answer and response: what the metrics see of it."""

    group: str
    part: str
    answer: str
    response: str

    @property
    def is_right(self) -> bool:
        return self.response.strip().lower() == self.answer.lower()

    @property
    def says_yes(self) -> bool:
        return self.response.strip().lower() == "yes"


Benchmark = Mapping[str, Sequence[Question]]


def load_benchmark(samples: Path) -> dict[str, tuple[Question, ...]]:
    """Reads the tasks that a folder of samples has in its `benchmark` folder; none if there is no such folder.

    Raises:
        LopError: a file is damaged, or lacks a column.
    """
    return {task: _load(task, path) for task in TASKS if (path := samples / FOLDER / f"{task}.parquet").is_file()}


def check_disjoint(benchmark: Benchmark, sets: SampleSets) -> None:
    """Checks that no image of the benchmark, nor a text that stands alone, was seen by calibration or search.

    Raises:
        LopError: one was; names it.
    """
    for name, samples in (("calibration", sets.calibration), ("reward", sets.reward)):
        seen = {key for sample in samples for key in sample.keys}
        for questions in benchmark.values():
            for question in questions:
                if not seen.isdisjoint(question.sample.keys):
                    what = "image" if question.sample.image else "text"
                    raise LopError(
                        f"{what} {question.sample.image_id} of {question.task} is also in the {name} samples"
                    )


def fingerprint_benchmark(benchmark: Benchmark) -> str:
    """A fingerprint of all tasks' images, questions, answers and groups, in order."""
    return fingerprint({task: fingerprint_questions(questions) for task, questions in benchmark.items()})


def fingerprint_questions(questions: Sequence[Question]) -> str:
    """A fingerprint of one task."""
    places = [[question.group, question.part] for question in questions]
    return fingerprint([places, fingerprint_samples([question.sample for question in questions])])


def limit(benchmark: Benchmark, groups: int | None) -> dict[str, tuple[Question, ...]]:
    """The benchmark with at most so many groups of each part of each task; all if None."""
    if groups is None:
        return {task: tuple(questions) for task, questions in benchmark.items()}

    def part(question: Question) -> str:
        return "" if question.task == "mmbench" else question.part  # MMBench's parts are one question's rotations.

    kept: dict[str, tuple[Question, ...]] = {}
    for task, questions in benchmark.items():
        seen: dict[str, dict[str, None]] = defaultdict(dict)
        for question in questions:
            seen[part(question)][question.group] = None
        chosen = {(name, group) for name, found in seen.items() for group in list(found)[:groups]}
        kept[task] = tuple(question for question in questions if (part(question), question.group) in chosen)
    return kept


# Probes: what to score so that responses are known without generating them.


def probes(questions: Iterable[Question]) -> list[Sample]:
    """The samples whose exact answers tell all responses: each question with its answer, each thing once.

    Where a metric asks how often yes was said (POPE), a question with answer no is also asked with answer yes.
    """
    found: dict[tuple[str, str, tuple[str, ...], str], Sample] = {}
    for question in questions:
        for sample in _probes_of(question):
            found.setdefault(_key(sample), sample)
    return list(found.values())


def respond(questions: Sequence[Question], scored: Sequence[Sample], hits: np.ndarray) -> list[Verdict]:
    """The verdicts that follow from which of the `probes` the model would write exactly; "" is any other response."""
    written = {_key(sample) for sample, hit in zip(scored, hits, strict=True) if hit}

    def response(question: Question) -> str:
        return next((sample.answer for sample in _probes_of(question) if _key(sample) in written), "")

    return [Verdict(q.group, q.part, q.sample.answer, response(q)) for q in questions]


def _probes_of(question: Question) -> tuple[Sample, ...]:
    sample = question.sample
    if question.task == "pope" and sample.answer.lower() == "no":
        return sample, replace(sample, answer={"no": "yes", "No": "Yes"}[sample.answer])
    return (sample,)


def _key(sample: Sample) -> tuple[str, str, tuple[str, ...], str]:
    return sample.image_key, sample.question, sample.options, sample.answer


# Metrics: each takes a task's verdicts.


def mmbench_metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """MMBench (Liu et al., ECCV 2024): `circular` counts a question only if it is right under every rotation of its
    options; `vanilla` is the accuracy of the first rotation alone."""
    first = [verdict.is_right for verdict in verdicts if verdict.part == "0"]
    return {"circular": _mean(_all_right(verdicts).values()), "vanilla": _mean(first)}


def mme_metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """MME (Fu et al., 2023): a category's score is accuracy + accuracy+, each in percent; accuracy+ is the share of
    images with both questions right. `perception` and `reasoning` are sums over their categories."""
    found: dict[str, float] = {}
    for part in dict.fromkeys(verdict.part for verdict in verdicts):
        mine = [verdict for verdict in verdicts if verdict.part == part]
        found[part] = 100 * (_mean(verdict.is_right for verdict in mine) + _mean(_all_right(mine).values()))
    totals = {
        half: sum(score for part, score in found.items() if part.startswith(f"{half}/"))
        for half in ("perception", "reasoning")
    }
    return {**totals, **found}


def mmmu_metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """MMMU (Yue et al., CVPR 2024): accuracy over all questions, and by subject."""
    parts = dict.fromkeys(verdict.part for verdict in verdicts)
    subjects = {part: _mean(verdict.is_right for verdict in verdicts if verdict.part == part) for part in parts}
    return {"accuracy": _mean(verdict.is_right for verdict in verdicts), **subjects}


def pope_metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """POPE (Li et al., EMNLP 2023): accuracy, precision, recall and F1 of saying yes, and how often yes is said; over
    all questions, and for each kind of negatives."""
    found = _yes_metrics(verdicts)
    for part in NEGATIVES:
        mine = [verdict for verdict in verdicts if verdict.part == part]
        found |= {f"{part}/{name}": value for name, value in _yes_metrics(mine).items()}
    return found


METRICS: dict[str, Callable[[Sequence[Verdict]], dict[str, float]]] = {
    "mmbench": mmbench_metrics,
    "mme": mme_metrics,
    "mmmu": mmmu_metrics,
    "pope": pope_metrics,
}


def _yes_metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    said = [verdict for verdict in verdicts if verdict.says_yes]
    true = sum(verdict.answer.lower() == "yes" for verdict in said)
    positive = sum(verdict.answer.lower() == "yes" for verdict in verdicts)
    precision = true / len(said) if said else 0.0
    recall = true / positive if positive else 0.0
    return {
        "accuracy": _mean(verdict.is_right for verdict in verdicts),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if true else 0.0,
        "yes_rate": len(said) / len(verdicts) if verdicts else 0.0,
    }


# Units: what a table's column is the mean of, for intervals and tests.


@dataclass(frozen=True)
class Units:
    """A column as a mean over strata of means over units.

    Attributes:
        values: [n] in [0, 1], in the order in which the units first come up in the task.
        strata: [n] each unit's stratum as an index.
        images: [n] each unit's image.
    """

    values: np.ndarray
    strata: np.ndarray
    images: tuple[str, ...]


def units(column: str, questions: Sequence[Question], verdicts: Sequence[Verdict]) -> Units:
    """A column's units; their mean over strata is the column's headline metric as a share of its maximum.

    mmbench: a question with all its rotations, one stratum. mme: a pair, (accuracy + accuracy+) / 2, a stratum for each
    category. mmmu: a question, one stratum. pope: a question, a stratum for each kind of negatives.
    """
    task, _, half = column.partition("_")
    mine = [(q, v) for q, v in zip(questions, verdicts, strict=True) if q.part.startswith(half)]
    grouped: dict[tuple[str, str], list[tuple[Question, Verdict]]] = defaultdict(list)
    for number, (question, verdict) in enumerate(mine):
        stratum = question.part if task in ("mme", "pope") else ""
        unit = question.group if task in ("mmbench", "mme") else str(number)
        grouped[stratum, unit].append((question, verdict))
    names = list(dict.fromkeys(stratum for stratum, _ in grouped))
    values = []
    for members in grouped.values():
        right = [verdict.is_right for _, verdict in members]
        values.append((_mean(right) + all(right)) / 2 if task == "mme" else float(all(right)))
    return Units(
        np.array(values),
        np.array([names.index(stratum) for stratum, _ in grouped]),
        tuple(members[0][0].sample.image_key for members in grouped.values()),
    )


def _all_right(verdicts: Sequence[Verdict]) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for verdict in verdicts:
        found[verdict.group] = found.get(verdict.group, True) and verdict.is_right
    return found


def _mean(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _load(task: str, path: Path) -> tuple[Question, ...]:
    samples = load_samples(path)
    for number, sample in enumerate(samples):
        if sample.is_prose:
            raise LopError(f"{path}, row {number} (counted from 0), column form: a benchmark asks, and has no prose")
    try:
        places = pq.read_table(path, columns=["group", "part"]).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise LopError(f"{path} is not a readable benchmark file: {str(error).splitlines()[0]}") from None
    return tuple(Question(task, place["group"], place["part"], sample) for place, sample in zip(places, samples))
