"""Every way to prune, by its entry in the registry: it meets the budget, and scores like any other."""

import shutil
from typing import Any

import numpy as np
import pytest
from hypothesis import given as given_
from hypothesis import settings
from hypothesis import strategies as st

from lop.errors import LopError
from lop.methods.flap import VARIANTS
from lop.methods.method import Given, Need, Reward, Root, Side
from lop.methods.registry import (
    BASELINES,
    CONTEXTUAL,
    DROPPINGS,
    IN_REPORT,
    METHODS,
    REFERENCE,
    RESHAPINGS,
    ROOTS,
    SEARCHES,
)
from lop.model.find import assets
from lop.model.importance import IMPORTANCES, OF_BOTH, SURVEYS_OF
from lop.model.samples import SampleSets
from lop.model.statistics import save_survey
from lop.report.cells import Cell, CellWorker
from lop.report.entries import given
from lop.run.building import Materials
from lop.run.config import find_config, load_config
from lop.run.run import Run
from lop.run.surveys import SURVEYS, surveys_of
from lop.search.evaluation import Evaluation
from lop.search.loop import InProcess
from lop.search.racing import Candidate
from lop.search.tree import TreeOptions
from lop.space.allocation import Allocation, Space
from lop.stages.rivals import Job, RivalWorker
from lop.stages.surveys import SurveyWorker

TARGET = 0.3
FEW = slice(0, 6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that ships, in a folder of its own, whose searches are short."""
    folder = tmp_path_factory.mktemp("registry") / "run"
    shutil.copytree(assets() / "run", folder)
    run = Run(load_config(folder / "config.yaml"), folder)
    neurons, few = np.tile(np.arange(run.space.neurons), (run.space.layers, 1)), run.samples.calibration[:20]
    for kind, survey in SURVEYS.items():
        worker = SurveyWorker(kind, Materials(run.config, neurons, run.statistics.mean, few))
        parts = [worker(piece).arrays for piece in survey.pieces(run.size, len(few))]
        found = {name: survey.merge([part[name] for part in parts]) for name in parts[0]}
        save_survey(run.survey_file(kind), found, run.calibration_fingerprints, seconds=1.0)
    return run


@pytest.fixture(scope="module")
def rivals(run: Run, samples: SampleSets) -> RivalWorker:
    search = run.config.search.model_copy(update={"evaluations": 20, "simulations": 20, "sensitivity_levels": 1})
    few = Materials(run.config.model_copy(update={"search": search}), run.order, run.statistics.mean, ())
    return RivalWorker(few, samples.reward[FEW], run.space, {"surgeon": run.order_by("surgeon")})


@pytest.fixture(scope="module")
def scorer(run: Run, samples: SampleSets) -> CellWorker:
    return CellWorker(Materials.of(run), run.surveyed(SURVEYS), samples.test[FEW])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_prunes_the_embedded_model_to_the_budget(
    name: str, run: Run, rivals: RivalWorker, scorer: CellWorker
) -> None:
    method, budget = METHODS[name], run.space.budget(TARGET)
    found: dict[int, tuple[Allocation, float]] = {}
    if method.search:
        (outcome,) = rivals(Job(name, (TARGET,), 0))
        assert outcome.curve[-1][1] == outcome.reward
        found[budget] = Allocation(outcome.widths), outcome.seconds
    choice = method(given(run, method, found=found, progress=False), budget)
    assert choice.allocation.budget == budget
    assert all(width % run.space.granularity == 0 for width in choice.allocation.widths)
    assert run.space.min_width <= min(choice.allocation.widths)
    assert max(choice.allocation.widths) <= run.space.max_width(budget)
    assert choice.importance in {*IMPORTANCES, *OF_BOTH}
    assert choice.seconds >= 0
    scored = scorer(Cell(choice.importance, choice.allocation.widths, choice.bias))
    assert len(scored.hits) == FEW.stop
    assert scored.sort_seconds > 0 < scored.prune_seconds


class _Linear:
    """An evaluator of a made-up model: later layers matter less."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def evaluate(self, candidate: Candidate) -> Evaluation:
        worth = -float(np.dot(candidate.allocation.ratios(self._space), np.linspace(2, 1, self._space.layers)))
        return Evaluation(0.0, worth, margin=worth, divergence=-worth)


@settings(max_examples=15)
@given_(st.floats(0.05, 0.85), st.integers(0, 99), st.sampled_from([1, 2, 8]), st.sampled_from(SEARCHES))
def test_every_search_meets_any_budget_and_answers_alike_again(
    target: float, seed: int, granularity: int, name: str
) -> None:
    space = Space(4, 32, granularity, 0.9)
    budget = space.budget(min(target, space.max_target))
    search = METHODS[name].search
    assert search is not None
    evaluator: Any = _Linear(space)

    def rate(evaluation: Evaluation) -> float:
        return evaluation.worth("log_probability")

    options = TreeOptions(
        simulations=30, evaluations=20, exploration=0.1, step=0.3, decay=0.8, children=4, depth=4, window=2, opponent=0
    )
    reward = Reward(
        evaluations=20,
        levels=3,
        options=options,
        weights=lambda: np.ones((space.layers, space.neurons)),
        reward=rate,
        tie_breaker=rate,
        evaluate=lambda allocation, _: evaluator.evaluate(Candidate(allocation)),
        workers=lambda: InProcess(evaluator),
        with_divergence=lambda: InProcess(evaluator),
    )
    (first,) = search.run(space, reward, [budget], seed)
    (again,) = search.run(space, reward, [budget], seed)
    assert first == again
    assert first.best.budget == first.budget == budget
    assert first.worth[0] == rate(evaluator.evaluate(Candidate(first.best))) == first.curve[-1][1]
    spent, best = zip(*first.curve)
    assert list(spent) == sorted(spent)
    assert list(best) == sorted(best)
    assert spent[-1] <= 20 or name in ("sensitivity", "puzzletron")  # Whose scans serve all budgets.


def test_the_names_that_configs_hold_are_the_registrys() -> None:
    assert all(method.name == name for name, method in METHODS.items())
    assert {"uniform", REFERENCE} <= set(ROOTS) & set(BASELINES) & set(IN_REPORT)
    for name, method in METHODS.items():
        assert (name in ROOTS) == (method.root is not None)
        assert (name in SEARCHES) == (Need.EVALUATIONS in method.needs)
        # What a search may start from is read off the statistics, is predicted, or comes from a search.
        assert method.root is not Root.READ or method.start is not None
        assert method.root in (None, Root.READ, Root.PREDICTED) or method.search is not None
        assert method.side is not Side.BASELINE or method.start is not None
        assert set(SURVEYS_OF.get(method.importance or "activation", ())) <= set(surveys_of(method.needs))


@pytest.mark.parametrize("name", ["lop-search", "lop-predictor", "flap", "evolution"])
def test_what_a_method_needs_and_has_not_is_one_line(name: str) -> None:
    space = Space(4, 32, 4, 0.9)
    with pytest.raises(LopError, match=r"missing|has no target"):
        METHODS[name](Given(space, "activation"), space.budget(0.5))


def test_the_companys_config_has_a_row_for_every_method() -> None:
    tables = load_config(find_config("company")).tables
    variants = {method.name for method in VARIANTS}
    # Of FFNs alone, which it prunes, those that know heads are the same as those that do not.
    of_heads = {name for name in BASELINES if METHODS[name].importance in OF_BOTH}
    assert set(tables.baselines or ()) == {*BASELINES, *RESHAPINGS} - variants - of_heads
    assert set(tables.rivals) == set(SEARCHES)
    assert not {*METHODS} & {*RESHAPINGS, *DROPPINGS, *CONTEXTUAL}
