"""The benchmark's metrics, worked by hand, and its questions as they ship."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from lop.errors import LopError
from lop.model.find import assets
from lop.model.samples import LETTERS, Sample, SampleSets
from lop.report.benchmark import (
    NEGATIVES,
    TASKS,
    Question,
    Verdict,
    check_disjoint,
    limit,
    load_benchmark,
    mmbench_metrics,
    mme_metrics,
    mmmu_metrics,
    pope_metrics,
    probes,
    respond,
    units,
)

SAMPLE = Sample(b"png", "set/1", "set", "shape", "yes_no", "Is this a circle?", (), "yes")


@pytest.fixture(scope="module")
def benchmark() -> dict[str, tuple[Question, ...]]:
    return load_benchmark(assets() / "samples")


def test_a_question_counts_only_if_right_in_every_rotation() -> None:
    verdicts = [
        Verdict("1", "0", "A", "A"), Verdict("1", "1", "B", " b "),
        Verdict("2", "0", "A", "A"), Verdict("2", "1", "B", "A"),
    ]  # fmt: skip
    assert mmbench_metrics(verdicts) == {"circular": 0.5, "vanilla": 1.0}


def test_mme_worked_by_hand() -> None:
    pairs = [
        Verdict("1", "perception/shape", "yes", "yes"), Verdict("1", "perception/shape", "no", "no"),
        Verdict("2", "perception/shape", "yes", "yes"), Verdict("2", "perception/shape", "no", "yes"),
        Verdict("3", "perception/colour", "yes", "yes"), Verdict("3", "perception/colour", "no", "no"),
        Verdict("4", "reasoning/negation", "yes", ""), Verdict("4", "reasoning/negation", "no", "no"),
    ]  # fmt: skip
    found = mme_metrics(pairs)
    assert found["perception/shape"] == 75 + 50
    assert found["perception"] == 125 + 200
    assert found["reasoning"] == 50 + 0


def test_pope_worked_by_hand() -> None:
    verdicts = [Verdict("", "random", answer, said) for answer, said in [
        ("yes", "yes"), ("yes", "Yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), ("no", "perhaps"),
    ]]  # fmt: skip
    found = pope_metrics(verdicts)
    assert found["accuracy"] == 3 / 6
    assert found["precision"] == found["recall"] == found["f1"] == pytest.approx(2 / 3)
    assert found["yes_rate"] == 3 / 6
    assert found["random/f1"] == found["f1"]
    assert found["popular/accuracy"] == 0.0


def test_mmmu_worked_by_hand() -> None:
    verdicts = [Verdict("1", "codes", "France", "france"), Verdict("2", "codes", "A", "B"), Verdict("3", "x", "A", "A")]
    assert mmmu_metrics(verdicts) == {"accuracy": pytest.approx(2 / 3), "codes": 0.5, "x": 1.0}


def test_probes_tell_what_was_said() -> None:
    no = replace(SAMPLE, question="Is this a triangle?", answer="no")
    questions = [
        Question("pope", "1", "random", SAMPLE), Question("pope", "1", "random", no),
        Question("pope", "1", "popular", SAMPLE),
    ]  # fmt: skip
    asked = probes(questions)
    assert [(sample.question, sample.answer) for sample in asked] == [
        (SAMPLE.question, "yes"), (no.question, "no"), (no.question, "yes"),
    ]  # fmt: skip
    said = [
        [v.response for v in respond(questions, asked, np.array(hits))] for hits in ([1, 0, 1], [0, 1, 0], [0, 0, 0])
    ]
    assert said == [["yes", "yes", "yes"], ["", "no", ""], ["", "", ""]]


def test_units_average_to_the_metric(benchmark: dict[str, tuple[Question, ...]]) -> None:
    random = np.random.default_rng(0)
    for column, key, full in [
        ("mmbench", "circular", 1), ("mme_perception", "perception", 800), ("mme_reasoning", "reasoning", 400),
        ("mmmu", "accuracy", 1), ("pope", "accuracy", 1),
    ]:  # fmt: skip
        task = column.partition("_")[0]
        verdicts = [
            Verdict(q.group, q.part, q.sample.answer, q.sample.answer if random.random() < 0.8 else "")
            for q in benchmark[task]
        ]
        metrics = {"mmbench": mmbench_metrics, "mme": mme_metrics, "mmmu": mmmu_metrics, "pope": pope_metrics}[task]
        found = units(column, benchmark[task], verdicts)
        mean = np.mean([found.values[found.strata == s].mean() for s in np.unique(found.strata)])
        assert full * mean == pytest.approx(metrics(verdicts)[key])


def test_what_ships_is_asked_as_the_real_ones_are(
    benchmark: dict[str, tuple[Question, ...]], samples: SampleSets
) -> None:
    assert set(benchmark) == set(TASKS)
    check_disjoint(benchmark, samples)
    test = {sample.image_key for sample in samples.test}
    assert {question.sample.image_key for questions in benchmark.values() for question in questions} <= test
    rotations = defaultdict(list)
    for question in benchmark["mmbench"]:
        rotations[question.group].append(question.sample)
    for turned in rotations.values():
        assert (
            {sample.answer for sample in turned}
            == set(LETTERS[: len(turned)])
            == set(LETTERS[: len(turned[0].options)])
        )
        assert len({sample.options[LETTERS.index(sample.answer)] for sample in turned}) == 1
    pairs = defaultdict(list)
    for question in benchmark["mme"]:
        pairs[question.group].append(question.sample)
        if question.part == "reasoning/negation":
            assert " not " in question.sample.question
    for pair in pairs.values():
        assert sorted(sample.answer for sample in pair) == ["no", "yes"]
        assert len({sample.image_key for sample in pair}) == 1
    answers = Counter((question.part, question.sample.answer) for question in benchmark["pope"])
    assert len({answers[part, answer] for part in NEGATIVES for answer in ("yes", "no")}) == 1
    assert sum(file.stat().st_size for file in (assets() / "samples").rglob("*.parquet")) < 10 * 2**20


def test_an_image_that_the_search_has_seen_is_named(samples: SampleSets) -> None:
    seen = {"pope": [Question("pope", "1", "random", samples.reward[0])]}
    with pytest.raises(LopError, match="also in the reward samples"):
        check_disjoint(seen, samples)


def test_a_limit_keeps_whole_groups(benchmark: dict[str, tuple[Question, ...]]) -> None:
    few = limit(benchmark, 3)
    assert len({question.group for question in few["mmbench"]}) == 3
    assert Counter(question.part for question in few["mme"]).most_common()[0][1] == 6
    assert limit(benchmark, None) == benchmark
