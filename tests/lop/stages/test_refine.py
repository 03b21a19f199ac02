"""A search that goes on near its answers: what it records, confirms, and takes up again."""

from pathlib import Path

import pytest

from lop.errors import CancelledError, LopError
from lop.report.report import _refinement_parts
from lop.run.config import find_config, load_config
from lop.run.results import read_search
from lop.run.run import Run
from lop.search.evaluation import Evaluation
from lop.search.ledger import read_ledger
from lop.search.loop import InProcess
from lop.space.allocation import Allocation
from lop.stages.calibrate import calibrate_stage
from lop.stages.local import Local
from lop.stages.search import search_stage
from lop.stages.train import train_stage
from lop.storage.files import read_json
from tests.lop.stages.samples_few import few_samples

SETTINGS = (
    "search.targets={first: 0.4, last: 0.6, step: 0.1}", "search.simulations=10", "search.evaluations=5",
    "search.roots=[flap]", "search.method=guided", "search.recovery=refit", "search.reward=divergence",
    "search.confirm={candidates: 2}", "search.refine={rounds: 2, evaluations: 6}", "train.epochs=2",
    "train.architectures=[mlp]",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refine")
    few_samples(folder, 48)
    return folder


def make_run(base: Path, name: str, *settings: str) -> Run:
    config = load_config(find_config("tiny"), [*SETTINGS, *settings], samples=str(base / "samples"))
    run = Run(config, base / name)
    calibrate_stage(run, progress=False)
    return run


@pytest.fixture(scope="module")
def searched(base: Path) -> Run:
    run = make_run(base, "whole")
    search_stage(run, Local(), progress=False)
    return run


def test_each_round_begins_at_the_answer_before_it_and_never_ends_behind_it(base: Path, searched: Run) -> None:
    plain = make_run(base, "plain", "search.refine=null")
    search_stage(plain, Local(), progress=False)
    moved = 0
    for found, before in zip(read_search(searched), read_search(plain), strict=True):
        assert found.evaluations == before.evaluations
        answer = before.best
        assert 1 <= len(found.refined) <= 2
        for each in found.refined:
            assert each.near == answer == each.evaluations[0][0]
            assert len(each.evaluations) <= 6
            assert {allocation.budget for allocation, _ in each.evaluations} == {answer.budget}
            confirmed = dict(each.confirmed)
            assert answer in confirmed
            assert confirmed[each.best].worth("divergence") == max(e.worth("divergence") for e in confirmed.values())
            moved += each.best != answer
            answer = each.best
        assert found.best == answer
        assert found.evaluation == dict(found.judged)[answer]
    assert moved


def test_what_is_refitted_otherwise_is_kept_apart(searched: Run) -> None:
    seen = {allocation for allocation, _ in read_ledger(searched.ledger)}
    for found in read_search(searched):
        for each in found.refined:
            assert {allocation for allocation, _ in each.evaluations[1:]}.isdisjoint(seen)


def test_the_report_tells_of_it(searched: Run) -> None:
    (_, table) = _refinement_parts(searched, read_search(searched))
    assert table.count("\n") >= 3
    assert "40.0%" in table


def test_the_predictor_learns_what_was_found_last(searched: Run) -> None:
    train_stage(searched, Local(), progress=False)
    assert read_json(searched.folder / "predictors.json")["training_targets"]


# The whole search is 18 evaluations with their confirmations; later ones are near the answers.
@pytest.mark.parametrize("left", [1, 8])
def test_an_interrupted_one_goes_on_where_it_stopped(
    base: Path, searched: Run, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect, asked = InProcess.collect, []

    def counting(workers: InProcess, seconds: float) -> list[tuple[Allocation, Evaluation]]:
        if len(asked) == stop:
            raise CancelledError("stopped")
        asked.append(None)
        return collect(workers, seconds)

    stop = -1
    whole = make_run(base, f"counted-{left}")
    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "collect", counting)
        search_stage(whole, Local(), progress=False)
        stop = len(asked) - left
        asked.clear()
        run = make_run(base, f"stopped-{left}")
        with pytest.raises(CancelledError):
            search_stage(run, Local(), progress=False)
        asked.clear()
        stop = -1
        search_stage(run, Local(), progress=False)
    assert len(asked) == left
    assert read_json(run.search_file)["targets"] == read_json(searched.search_file)["targets"]


@pytest.mark.parametrize("settings", ["search.method=paper", "search.recovery=none", "search.confirm=null"])
def test_where_it_makes_no_sense_it_is_refused(settings: str) -> None:
    with pytest.raises(LopError, match="refine needs search"):
        load_config(find_config("tiny"), [*SETTINGS, settings])
