"""Training: what the run's own predictors are compared with."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from lop.model.find import assets
from lop.run.config import load_config
from lop.run.features import save_features
from lop.run.prediction import predictor_for, unsearched
from lop.run.results import read_search
from lop.run.run import Run
from lop.search.evaluation import Evaluation
from lop.search.racing import Candidate
from lop.space.features import PRUNED, SCALARS, Features
from lop.stages.train import train_stage
from lop.storage.files import read_json
from tests.lop.stages.test_probe import LAYERS, MadeUp

FEW = ("train.epochs=1", "train.architectures=[mlp]", "search.reward=divergence")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The run that ships, which has no features."""
    shutil.copytree(assets() / "run", tmp_path / "run")
    return Run(load_config(tmp_path / "run" / "config.yaml", FEW), tmp_path / "run")


def test_the_general_predictor_is_compared_where_features_are_known(run: Run) -> None:
    curve = np.tile(np.log(0.01) + 2 * np.log(PRUNED), (LAYERS, 1))
    save_features(run, Features(np.stack([curve / 2, curve / 2, curve]), np.zeros((LAYERS, len(SCALARS)))))
    compute = MadeUp()
    train_stage(run, compute, progress=False)
    (other,) = read_json(run.folder / "predictors.json")["others"]
    general, targets = unsearched(run), [found.target for found in read_search(run)]
    answers = [general.allocate(run.space.budget(target)) for target in targets]
    assert set(answers) <= set(compute.seen)
    shares = 1 - np.array([answer.widths for answer in answers]) / run.space.neurons
    cost = (np.where(np.arange(LAYERS) == 7, 50.0, 0.01) * shares**2).sum(1).mean()
    assert other == {"source": "general, 0 probes", "reward": pytest.approx(-cost)}
    assert predictor_for(run, run.config).source is None  # The run's own answers.


def test_without_features_its_own_are_compared_alone(run: Run) -> None:
    train_stage(run, MadeUp(), progress=False)
    report = read_json(run.folder / "predictors.json")
    assert (report["chosen"], report["others"]) == ("mlp", [])


class Interrupted(MadeUp):
    """Is stopped when it has scored a few."""

    def evaluate(self, candidate: Candidate) -> Evaluation:
        if len(self.seen) == 3:
            raise KeyboardInterrupt
        return super().evaluate(candidate)


def test_what_was_scored_before_an_interruption_is_not_scored_again(run: Run) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_stage(run, first := Interrupted(), progress=False)
    train_stage(run, second := MadeUp(), progress=False)
    assert len(first.seen) == 3
    assert not set(first.seen) & set(second.seen)
    report = run.folder / "predictors.json"
    found = read_json(report)
    shutil.rmtree(run.folder / "ledger")
    report.unlink()
    train_stage(run, whole := MadeUp(), progress=False)
    assert set(whole.seen) == {*first.seen, *second.seen}
    assert read_json(report) == found
