"""The tables' numbers, computed a second time, question by question."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from lop.methods.method import Need, Seconds, Side
from lop.model.find import assets
from lop.report.benchmark import Question, Verdict, limit, load_benchmark
from lop.report.board import Board, pairwise_tests, values
from lop.report.cells import Cell, Scored
from lop.report.entries import Entry, baselines, grouped
from lop.report.intervals import mcnemar
from lop.report.speed import speeds
from lop.run.config import find_config, load_config
from lop.run.run import Run

Verdicts = dict[str, list[Verdict]]
FULL = Cell("activation", (64,))
CELLS = {
    ("dense", Side.DENSE, 0): (FULL, 0.95),
    ("uniform", Side.BASELINE, 0): (Cell("activation", (32,)), 0.5),
    ("flap", Side.BASELINE, 0): (Cell("flap", (32,), bias=True), 0.6),
    ("random", Side.RIVAL, 0): (Cell("activation", (31,)), 0.4),
    ("random", Side.RIVAL, 1): (Cell("activation", (30,)), 0.5),
    ("lop-search", Side.LOP, 0): (Cell("activation", (29,)), 0.9),
    ("predictor mlp", Side.ARCHITECTURE, 0): (Cell("activation", (28,)), 0.8),
}
ENTRIES = [
    Entry(method, side, 0.0 if side is Side.DENSE else 0.5, seed, cell, frozenset({Need.ACTIVATIONS}), 1.0)
    for (method, side, seed), (cell, _) in CELLS.items()
]


@pytest.fixture(scope="module")
def questions() -> dict[str, tuple[Question, ...]]:
    return limit(load_benchmark(assets() / "samples"), 6)


@pytest.fixture(scope="module")
def verdicts(questions: Mapping[str, Sequence[Question]]) -> dict[Cell, Verdicts]:
    """Answers drawn by chance, some methods better than others."""
    random = np.random.default_rng(3)
    return {
        cell: {
            task: [
                Verdict(q.group, q.part, q.sample.answer, q.sample.answer if random.random() < share else "")
                for q in mine
            ]
            for task, mine in questions.items()
        }
        for cell, share in CELLS.values()
    }


def naive(column: str, mine: Sequence[Verdict]) -> float:
    """A column's share of its maximum, as the benchmark's papers define it."""
    task, _, half = column.partition("_")
    by_part: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for number, verdict in enumerate(mine):
        part = verdict.part if task in ("mme", "pope") else ""
        group = verdict.group if task in ("mme", "mmbench") else str(number)
        if verdict.part.startswith(half):
            by_part[part][group].append(verdict.response == verdict.answer)
    if task == "mme":
        return fmean(fmean((fmean(g) + all(g)) / 2 for g in groups.values()) for groups in by_part.values())
    return fmean(fmean(all(group) for group in groups.values()) for groups in by_part.values())


def test_values_are_those_computed_question_by_question(
    questions: Mapping[str, Sequence[Question]], verdicts: dict[Cell, Verdicts]
) -> None:
    columns = ("mmbench", "mme_perception", "mme_reasoning", "mmmu", "pope")

    def share(cells: Sequence[Cell], column: str) -> float:
        if column == "average":
            return fmean(share(cells, name) for name in columns)
        return fmean(naive(column, verdicts[cell][column.partition("_")[0]]) for cell in cells)

    found = list(values(Board(questions, verdicts, FULL), ENTRIES))
    groups = {name: [entry.cell for entry in group] for (name, _), group in grouped(ENTRIES).items()}
    assert {(value.method, value.column) for value in found} == {
        (name, column) for name in groups for column in (*columns, "average")
    }
    against = {"lop": {"uniform", "flap", "random"}, "baseline": {"lop-search"}, "rival": {"lop-search"}}
    for value in found:
        mine = share(groups[value.method], value.column)
        assert value.share.value == pytest.approx(mine)
        assert value.share.low <= mine <= value.share.high
        assert list(value.seeds) == pytest.approx([share([cell], value.column) for cell in groups[value.method]])
        unit = 100.0
        if value.column.startswith("mme"):
            unit = 200.0 * len({q.part for q in questions["mme"] if q.part.startswith(value.column[4:])})
        assert value.metric == pytest.approx(unit * mine)
        assert value.drop == pytest.approx(unit * (share([FULL], value.column) - mine))
        others = against.get(value.side, against["lop"] if value.side is Side.ARCHITECTURE else {value.method})
        best = max(share(groups[name], value.column) for name in others)
        assert value.rival in others
        assert value.lead.value == pytest.approx(mine - best)
        assert not value.bold or (value.p < 0.05 and value.lead.value > 0)
    assert any(value.bold for value in found if value.method == "lop-search")


def test_a_lead_is_resampled_image_by_image(
    questions: Mapping[str, Sequence[Question]], verdicts: dict[Cell, Verdicts]
) -> None:
    images = list(dict.fromkeys(q.sample.image_key for mine in questions.values() for q in mine))
    draws = np.random.default_rng(0).multinomial(len(images), np.full(len(images), 1 / len(images)), size=2000)
    found = values(Board(questions, verdicts, FULL), ENTRIES)
    value = next(value for value in found if value.method == "uniform" and value.column == "mmmu")
    assert value.rival == "lop-search"
    ours, theirs = (
        np.array([v.response == v.answer for v in verdicts[CELLS[key][0]]["mmmu"]], float)
        for key in (("uniform", Side.BASELINE, 0), ("lop-search", Side.LOP, 0))
    )
    leads = []
    for draw in draws:
        weights = np.array([draw[images.index(q.sample.image_key)] for q in questions["mmmu"]])
        leads.append(((ours - theirs) * weights).sum() / max(weights.sum(), 1))
    low, high = np.percentile(leads, [2.5, 97.5])
    assert (value.lead.low, value.lead.high) == pytest.approx((low, high), abs=1e-6)
    leads_above, leads_below = np.sum(np.array(leads) > 1e-9), np.sum(np.array(leads) < -1e-9)
    assert value.p == pytest.approx(2 * (2001 - max(leads_above, leads_below)) / 2001)


def test_lops_methods_are_tested_against_each_other_method(
    questions: Mapping[str, Sequence[Question]], verdicts: dict[Cell, Verdicts]
) -> None:
    found = {test.baseline: test for test in pairwise_tests(Board(questions, verdicts, FULL), ENTRIES)}
    assert found.keys() == {"uniform", "flap", "random"}
    right = {
        name: np.array([v.response == v.answer for mine in verdicts[cell].values() for v in mine])
        for (name, _, seed), (cell, _) in CELLS.items()
        if seed == 0
    }
    for name, test in found.items():
        assert test.mcnemar_p == mcnemar(right["lop-search"], right[name])


def test_speed_ups_worked_by_hand() -> None:
    run = Run(load_config(find_config("tiny")), assets() / "run")
    plain, biased = Cell("activation", (1,)), Cell("flap", (1,), bias=True)
    scored = {plain: Scored(np.ones(1, bool), 2.0, 1.0), biased: Scored(np.ones(1, bool), 4.0, 3.0)}
    entries = [
        Entry("magnitude", Side.BASELINE, 0.5, 0, plain, frozenset(), 1.0),
        Entry("flap", Side.BASELINE, 0.5, 0, biased, frozenset({Need.ACTIVATIONS}), 1.0),
        *(Entry("flap", Side.BASELINE, 0.6, 0, biased, frozenset({Need.ACTIVATIONS}), each) for each in (2.0, 9.0)),
        Entry("lop-predictor", Side.LOP, 0.5, 0, plain, frozenset({Need.ACTIVATIONS}), 0.5),
        Entry("predictor mlp", Side.ARCHITECTURE, 0.5, 0, plain, frozenset(), 0.5),
    ]
    found = {speed.method: speed for speed in speeds(run, entries, scored)}
    first = found["flap"].seconds.calibrate
    assert first > 0  # What ships was measured.
    assert {name: speed.seconds for name, speed in found.items()} == {
        "magnitude": Seconds(0.0, 1.0, 2.0, 1.0),
        "flap": Seconds(first, 2.0, 4.0, 3.0),
        "lop-predictor": Seconds(first, 0.5, 2.0, 1.0),
    }
    whole = first + 2 + 4 + 3
    assert found["flap"].paper == found["flap"].cached == 1
    assert (found["magnitude"].paper, found["magnitude"].cached) == pytest.approx((whole / 4, 5 / 2))
    # LOP's statistics and order are there when a target is asked for.
    assert (found["lop-predictor"].paper, found["lop-predictor"].cached) == pytest.approx((whole / 1.5, 5 / 1.5))
    assert np.isnan(next(speeds(run, entries[:1], scored)).paper)


def test_nothing_stands_twice_where_all_have_one_recovery(tmp_path: Path) -> None:
    published, recovered = (
        baselines(Run(load_config(find_config("tiny"), [f"search.recovery={recovery}"]), tmp_path))
        for recovery in ("none", "refit")
    )
    assert {"flap", "flap-wifv-al-am", "flap-ifv-al-am", "flap-ifv-al-am-bias"} <= set(published)
    assert {"flap", "flap-ifv-al-am"} <= set(recovered)
    assert not {"flap-wifv-al-am", "flap-ifv-al-am-bias"} & set(recovered)
    assert {"uniform", "magnitude", "wanda", "owl", "alphapruning"} <= set(recovered)
