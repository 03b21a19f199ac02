"""A calibrated model that was never searched: predicted at once, probed, and searched from there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from lop.cli import main
from lop.errors import LopError
from lop.model.find import assets
from lop.predictor.probing import surest
from lop.run.choice import answer
from lop.run.config import load_config
from lop.run.features import features_file, save_features
from lop.run.prediction import predictor_for, predictor_identity
from lop.run.probes import probes_file
from lop.run.run import Run
from lop.search.evaluation import Evaluation
from lop.search.loop import InProcess, Workers
from lop.search.moves import perturb
from lop.search.racing import Candidate, pack_values
from lop.space.allocation import Allocation, uniform
from lop.space.features import PRUNED, SCALARS, Features
from lop.space.size import Target
from lop.stages.local import Local
from lop.stages.probe import probe_stage
from lop.stages.search import build_trees
from tests.lop.stages.samples_few import few_samples

LAYERS = 12


@dataclass
class MadeUp(Local):
    """Evaluates by a formula: one layer, which features say nothing of, costs more than all others."""

    seen: list[Allocation] = field(default_factory=list)

    @contextmanager
    def evaluators(self, run: Run) -> Iterator[Workers]:
        yield InProcess(self)

    def evaluate(self, candidate: Candidate) -> Evaluation:
        self.seen.append(candidate.allocation)
        shares = 1 - np.array(candidate.allocation.widths) / 160
        costs = np.where(np.arange(LAYERS) == 7, 50.0, 0.01)
        damage = float((costs * shares**2).sum())
        values = pack_values(np.full(4, -damage)) if candidate.itemised else None
        return Evaluation(0.5, -1.0, divergence=damage, values=values)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The embedded model, calibrated."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(assets() / "run" / "statistics.safetensors", folder)
    settings = ["search.reward=divergence", "search.roots=[general]", "search.confirm={}"]
    found = Run(load_config(assets() / "run" / "config.yaml", settings), folder)
    curve = np.tile(np.log(0.01) + 2 * np.log(PRUNED), (LAYERS, 1))
    scalars = np.zeros((LAYERS, len(SCALARS)))
    save_features(found, Features(np.stack([curve / 2, curve / 2, curve]), scalars))
    return found


def test_a_calibrated_model_is_answered_for_and_it_is_said_by_what(run: Run) -> None:
    found = answer(run, run.config, Target(ratio=0.3), "hf")
    assert found["source"] == "general, 0 probes"
    assert sum(found["widths"]) == run.space.budget(0.3)


def test_probes_find_what_no_feature_tells(run: Run) -> None:
    before, compute = predictor_for(run, run.config).allocate(run.space.budget(0.3)), MadeUp()
    identity = predictor_identity(run)
    assert len(probe_stage(run, compute, 20, progress=False).probes) == len(compute.seen) == 20
    after = predictor_for(run, run.config)
    assert after.source == "general, 20 probes"
    assert after.allocate(run.space.budget(0.3)).widths[7] > before.widths[7]
    assert predictor_identity(run) != identity


def test_no_probe_is_made_twice_and_more_of_them_go_on(run: Run) -> None:
    first, second = MadeUp(), MadeUp()
    probe_stage(run, first, 6, progress=False)
    probe_stage(run, second, 9, progress=False)
    assert len(second.seen) == 3
    assert not set(first.seen) & set(second.seen)


def test_for_a_target_allocations_are_compared_and_the_best_answers(run: Run) -> None:
    compute, budget = MadeUp(), run.space.budget(0.5)
    before = predictor_for(run, run.config).allocate(budget)
    probe_stage(run, compute, 30, 0.5, progress=False)
    compared = [allocation for allocation in compute.seen if allocation.budget == budget]
    assert len(set(compute.seen)) == len(compute.seen) <= 30
    assert compared
    # Each layer alone came first, and then, beside what was predicted, what follows from them.
    assert {sum(width < 160 for width in allocation.widths) for allocation in compute.seen[:LAYERS]} == {1}
    assert before in compute.seen[LAYERS:]
    best = max(compared, key=lambda allocation: allocation.widths[7])
    assert predictor_for(run, run.config).allocate(budget).widths[7] == best.widths[7]


def test_the_same_budget_again_makes_nothing_and_layers_probed_before_leave_something_for_a_target(run: Run) -> None:
    first, again, other = MadeUp(), MadeUp(), MadeUp()
    known = probe_stage(run, first, 20, 0.5, progress=False)
    assert probe_stage(run, again, 20, 0.5, progress=False) == known
    assert not again.seen
    probe_stage(run, other, 20, progress=False)
    assert {sum(width < 160 for width in allocation.widths) for allocation in other.seen} == {1}
    budget, last = run.space.budget(0.3), MadeUp()
    probe_stage(run, last, 20, 0.3, progress=False)
    assert 0 < len(last.seen) <= 12
    assert {allocation.budget for allocation in last.seen} == {budget}


@pytest.mark.parametrize(("gain", "is_taken"), [(-3.0, False), (0.0, False), (0.9, False), (1.1, True), (3.0, True)])
def test_what_is_predicted_is_left_only_for_a_gain_of_more_than_its_standard_error(
    run: Run, gain: float, is_taken: bool
) -> None:
    random, samples, start = np.random.default_rng(0), 400, uniform(run.space, run.space.budget(0.5))
    other = perturb(start, run.space, start.budget, random, 0.3)
    apart = random.standard_exponential(samples)
    apart = (apart - apart.mean()) / apart.std() + gain / np.sqrt(samples)
    # What samples differ by alike for both is no doubt about either.
    worth = -10 * random.standard_exponential(samples)

    def evaluation(values: np.ndarray) -> Evaluation:
        return Evaluation(0.5, -1.0, divergence=-float(values.mean()), values=pack_values(values))

    found = {start: evaluation(worth), other: evaluation(worth + apart)}
    assert surest(found, [start]) == (other if is_taken else start)


def test_what_could_not_be_evaluated_is_no_answer_while_anything_else_is(run: Run) -> None:
    starts = [
        uniform(run.space, run.space.budget(0.5)),
        perturb(
            uniform(run.space, run.space.budget(0.5)), run.space, run.space.budget(0.5), np.random.default_rng(0), 0.3
        ),
    ]
    failed = Evaluation.failed("out of memory")
    assert surest(dict.fromkeys(starts, failed), starts) == starts[0]
    known = Evaluation(0.5, -1.0, divergence=1.0, values=pack_values(np.full(4, -1.0)))
    assert surest({starts[0]: failed, starts[1]: known}, starts) == starts[1]


def test_a_search_starts_from_it(run: Run) -> None:
    trees = build_trees(run)
    for target, tree in trees.items():
        asked: list[Allocation] = []
        for _ in range(3):
            for candidate in tree.advance():
                asked.append(candidate.allocation)
                tree.tell(candidate.allocation, Evaluation(0.5, -1.0, divergence=1.0))
        assert predictor_for(run, run.config).allocate(run.space.budget(target)) in asked[:2]


def test_what_is_wrong_is_told_in_one_line(run: Run) -> None:
    with pytest.raises(LopError, match="at least 1 evaluation"):
        probe_stage(run, MadeUp(), 0)
    without = run.config.search.model_copy(update={"reward": "accuracy"})
    other = Run(run.config.model_copy(update={"search": without}), run.folder)
    with pytest.raises(LopError, match="search does not measure"):
        probe_stage(other, MadeUp(), 3)
    probes_file(run).write_text('{"probes": 3}')
    with pytest.raises(LopError, match="is damaged"):
        predictor_for(run, run.config)
    features_file(run).unlink()
    with pytest.raises(LopError, match="run `lop train` first, after a search, or `lop calibrate`"):
        predictor_for(run, run.config)


def test_features_of_another_order_are_refused(run: Run) -> None:
    other = Run(run.config.model_copy(update={"importance": "magnitude"}), run.folder)
    with pytest.raises(LopError, match="made with another importance"):
        predictor_for(other, other.config)


def test_from_a_new_model_to_a_probed_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("--run", str(tmp_path / "run"))
    settings = ("--config", "tiny", "--set", f"samples={few_samples(tmp_path)}", "--set", "workers=0")
    assert main(["calibrate", *run, *settings]) == 0
    assert main(["calibrate", *run]) == 0  # The run has its settings now, and everything is there.
    assert main(["probe", *run, "--budget", "2"]) == 0
    capsys.readouterr()
    assert main(["predict", *run, "--target", "0.3"]) == 0
    assert capsys.readouterr().out.startswith("source: general, 2 probes\n")
