"""A search that begins with a descent: what it records, starts from, and scores again after an interruption."""

from pathlib import Path

import pytest

from lop.errors import CancelledError
from lop.run.building import few_samples as descended_on
from lop.run.config import find_config, load_config
from lop.run.results import read_search
from lop.run.run import Run
from lop.search.evaluation import Evaluation
from lop.search.ledger import evaluations, read_ledger
from lop.search.loop import InProcess
from lop.space.allocation import Allocation, uniform
from lop.stages.calibrate import calibrate_stage
from lop.stages.local import Local
from lop.stages.search import search_stage
from lop.storage.files import read_json
from tests.lop.stages.samples_few import few_samples

SETTINGS = (
    "search.targets={first: 0.3, last: 0.5, step: 0.2}", "search.simulations=12", "search.evaluations=6",
    "search.roots=[flap]", "search.method=guided", "search.recovery=refit", "search.reward=divergence",
    "search.confirm={}", "search.descent={samples: 12, rounds: 2}",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("descent")
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


def test_the_trees_start_where_the_descent_led(searched: Run) -> None:
    measured, judged = descended_on(searched.config, searched.searched_samples[0]).values()
    assert len(measured) == len(judged) == 12
    assert not {id(sample) for sample in measured} & {id(sample) for sample in judged}
    records = read_json(searched.search_file)["targets"]
    assert any(record["descent"]["path"] for record in records)
    for found, record in zip(read_search(searched), records, strict=True):
        budget = searched.space.budget(found.target)
        path = [Allocation(tuple(widths)) for widths in record["descent"]["path"]]
        scored = [allocation for allocation, _ in found.evaluations]
        assert scored[0] == uniform(searched.space, budget)
        assert set(path) <= set(scored)
        assert all(allocation.budget == budget for allocation in path)
        assert found.descended == record["descent"]["scored"] >= 12 * (1 + searched.space.layers)


def test_few_samples_are_no_evaluations_of_the_search(searched: Run) -> None:
    ledger = list(read_ledger(searched.ledger))
    few = [evaluation for _, evaluation in ledger if evaluation.few]
    assert len(few) * 12 == sum(found.descended for found in read_search(searched))
    shown = evaluations(searched.location)
    assert sum(not entry["complete"] for entry in shown) == len(few)
    assert not any(evaluation.few for found in read_search(searched) for _, evaluation in found.evaluations)


@pytest.mark.parametrize("after", [3, 20])
def test_an_interrupted_descent_ends_as_a_calm_one(
    base: Path, searched: Run, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(base, f"stopped-{after}")
    collect, asked = InProcess.collect, []

    def stopping(workers: InProcess, seconds: float) -> list[tuple[Allocation, Evaluation]]:
        if len(asked) == after:
            raise CancelledError("stopped")
        asked.append(None)
        return collect(workers, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(InProcess, "collect", stopping)
        with pytest.raises(CancelledError):
            search_stage(run, Local(), progress=False)
    assert len(list(read_ledger(run.ledger))) == after
    search_stage(run, Local(), progress=False)
    assert read_json(run.search_file)["targets"] == read_json(searched.search_file)["targets"]


def test_the_papers_search_does_not_descend(base: Path) -> None:
    run = make_run(base, "paper", "search.method=paper")
    search_stage(run, Local(), progress=False)
    assert all(found.descended == 0 for found in read_search(run))
    assert not any(evaluation.few for _, evaluation in read_ledger(run.ledger))
