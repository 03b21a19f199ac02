"""Ways to compute less, against LOP's widths that compute as much; and a comparison that goes on."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import pytest

from lop.model.beyond.flops import flops
from lop.model.find import assets
from lop.model.samples import SampleSets
from lop.report.operations import Answered, Way, WayWorker, compared_ways, score_ways
from lop.run.building import Materials, Workshop
from lop.run.config import load_config
from lop.run.prediction import open_predictor
from lop.run.run import Run
from lop.search.scoring import Scoring
from lop.space.allocation import Allocation

Item = TypeVar("Item")
Result = TypeVar("Result")
FEW = slice(0, 24)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("operations") / "run"
    shutil.copytree(assets() / "run", folder)
    return Run(load_config(folder / "config.yaml", ("compare.methods=[flap, yopo, dejavu, fastv]",)), folder)


@pytest.fixture(scope="module")
def worker(run: Run, samples: SampleSets) -> WayWorker:
    materials = Materials(run.config, run.order, run.statistics.mean, tuple(samples.calibration[FEW]))
    return WayWorker(materials, open_predictor(run, run.predictor_folder), samples.test[FEW])


def test_the_config_names_them(run: Run) -> None:
    ways = compared_ways(run)
    assert ways[:2] == [Way("fastv", 0.33), Way("fastv", 0.33, 0.2)]
    assert [way.method for way in ways] == ["fastv"] * 12 + ["yopo"] * 12 + ["dejavu"] * 3
    assert [way.share for way in ways[-3:]] == [0.2, 0.3, 0.5]


@pytest.mark.parametrize("way", [Way("yopo", 0.75, 0.3), Way("sparsevlm", 0.5), Way("dejavu", 0.5)])
def test_lop_alone_computes_as_much(way: Way, run: Run, worker: WayWorker, samples: SampleSets) -> None:
    found = worker(way)
    assert found.ratio is not None
    assert found.ratio > way.base
    workshop = Workshop(Materials.of(run))
    encoded = workshop.encode(samples.test[FEW])
    lengths = [group.length for batch in encoded.batches for group in batch.groups for _ in range(group.count)]
    predictor, backbone = open_predictor(run, run.predictor_folder), workshop.elastic.backbone

    def computed(ratio: float) -> int:
        budget = round((1 - ratio) * run.space.whole)
        workshop.elastic.prune(predictor.allocate(budget) if ratio else Allocation((160,) * 12))
        return flops(backbone, [lengths] * 12, sum(len(batch.places) for batch in encoded.batches))

    step = run.space.granularity / run.space.whole
    dense = computed(0)
    assert computed(found.ratio) <= found.flops * dense < computed(found.ratio - step)
    computed(found.ratio)
    assert (found.alone == Scoring(backbone, encoded).scores().correct).all()


def test_what_computes_less_than_lops_leanest_has_no_equal(run: Run, worker: WayWorker) -> None:
    found = worker(Way("fastv", 0.75, run.space.max_target))
    assert found.ratio is None
    assert not found.alone.any()


def test_what_is_scored_is_not_scored_again(run: Run, samples: SampleSets) -> None:
    ways, asked = compared_ways(run)[:3], samples.test[FEW]
    made = Answered(np.arange(24) < 7, 0.9, 0, 1.5, 0.25, np.arange(24) < 9)
    seen: list[Way] = []

    def spread(build: Callable[[], Callable[[Item], Result]], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        for item in items:
            if len(seen) == 1:
                seen.append(item)  # type: ignore[arg-type]
                raise KeyboardInterrupt
            seen.append(item)  # type: ignore[arg-type]
            yield item, made  # type: ignore[misc]

    with pytest.raises(KeyboardInterrupt):
        score_ways(run, ways, asked, spread, progress=False)
    found = score_ways(run, ways, asked, spread, progress=False)
    assert seen == [*ways[:2], *ways[1:]]
    for each in found.values():
        assert each.as_dict() == made.as_dict()
    assert score_ways(run, [], asked, spread) == {}
