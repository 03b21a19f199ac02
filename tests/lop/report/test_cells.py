"""Cells: what a sliced elastic model is scored to write is what a model cut by hand writes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lop.checkpoint.recovery import recover_elastic
from lop.methods.registry import RESHAPINGS
from lop.model.adapter import QwenVL
from lop.model.elastic import ElasticModel
from lop.model.encoding import encode
from lop.model.find import assets
from lop.model.generation import answers
from lop.model.importance import importance, order
from lop.model.samples import SampleSets
from lop.model.statistics import NeuronStatistics
from lop.report.cells import Cell, CellWorker, Scored, score_cells
from lop.run.building import Materials
from lop.run.config import find_config, load_config
from lop.run.run import Run
from lop.search.scoring import Scoring
from lop.space.allocation import Allocation

WIDTHS = (0.5, 0.9)  # Of every other layer, so that layers differ.


def cut(model: QwenVL, statistics: NeuronStatistics, cell: Cell) -> None:
    """Cuts a model's matrices as a cell says, neuron by neuron."""
    scores = importance(cell.importance, statistics)
    for layer, (ffn, width) in enumerate(zip(model.ffns, cell.widths, strict=True)):
        ranked = sorted(range(len(scores[layer])), key=lambda neuron: -scores[layer][neuron])
        kept, pruned = torch.tensor(ranked[:width]), torch.tensor(ranked[width:])
        down = ffn.down_proj.weight.data
        lost = down[:, pruned] @ torch.from_numpy(statistics.mean[layer]).to(down)[pruned]
        ffn.gate_proj.weight.data = ffn.gate_proj.weight.data[kept]
        ffn.up_proj.weight.data = ffn.up_proj.weight.data[kept]
        ffn.down_proj.weight.data = down[:, kept]
        if cell.bias:
            ffn.down_proj.bias = torch.nn.Parameter(lost)


@pytest.mark.parametrize(("name", "bias"), [("activation", False), ("flap", True)])
def test_hits_are_what_a_model_cut_by_hand_generates(
    name: str, bias: bool, tiny: QwenVL, samples: SampleSets, tiny_statistics: NeuronStatistics
) -> None:
    asked = samples.test[::40]
    layers, neurons = tiny_statistics.mean.shape
    cell = Cell(name, tuple(int(neurons * WIDTHS[layer % 2]) for layer in range(layers)), bias)
    ranked = order(importance("activation", tiny_statistics))
    materials = Materials(load_config(find_config("tiny")), ranked, tiny_statistics.mean, ())
    scored = CellWorker(materials, tiny_statistics, asked)(cell)
    cut(tiny, tiny_statistics, cell)
    written = answers(tiny, asked, progress=False)
    expected = [text.strip().lower() == sample.answer.lower() for text, sample in zip(written, asked)]
    assert scored.hits.tolist() == expected
    assert 0 < sum(expected) < len(expected)
    assert Scored.from_dict(scored.as_dict(), len(asked)).hits.tolist() == expected


@pytest.mark.parametrize("importance_name", ["activation", "flap"])
def test_cells_have_what_the_search_scores_with(
    importance_name: str, tiny: QwenVL, samples: SampleSets, tiny_statistics: NeuronStatistics
) -> None:
    asked, few = samples.test[::20], samples.calibration[::8]
    ranked = order(importance("activation", tiny_statistics))
    cell = Cell(importance_name, (48,) * 12, bias=importance_name == "flap")
    hits = {}
    for recovery in ("none", "refit"):
        config = load_config(find_config("tiny"), [f"search.recovery={recovery}"])
        worker = CellWorker(Materials(config, ranked, tiny_statistics.mean, few), tiny_statistics, asked)
        hits[recovery] = worker(cell).hits
        assert worker(Cell("activation", (160,) * 12)).hits.sum() > hits[recovery].sum()  # It is dense again.
    elastic = ElasticModel(tiny, order(importance(importance_name, tiny_statistics)))
    calibration = encode(tiny, few, batch_tokens=2048)
    recover_elastic(elastic, Allocation(cell.widths), "refit", means=tiny_statistics.mean, calibration=calibration)
    expected = Scoring(elastic.backbone, encode(tiny, asked, batch_tokens=2048)).scores().correct
    assert hits["refit"].tolist() == expected.tolist()
    assert hits["refit"].sum() > hits["none"].sum() + 5  # Where each is as published, FLAP has its bias.


def test_reshaped_models_are_scored_as_their_method_makes_them(
    tiny: QwenVL, samples: SampleSets, tiny_statistics: NeuronStatistics
) -> None:
    asked, few = samples.test[::40], samples.calibration[::20]
    ranked = order(importance("activation", tiny_statistics))
    materials = Materials(load_config(find_config("tiny")), ranked, tiny_statistics.mean, few)
    worker = CellWorker(materials, tiny_statistics, asked)
    whole = Cell("activation", (160,) * 12)
    scored, dense = worker(replace(whole, reshaped=("shortgpt", 150_000))), worker(whole)
    backbone = ElasticModel(tiny, ranked).backbone
    made = RESHAPINGS["shortgpt"].reshape(backbone, encode(tiny, few, batch_tokens=2048), 150_000, False)
    assert len(made.backbone.layers) == 8
    expected = Scoring(made.backbone, encode(tiny, asked, batch_tokens=2048)).scores().correct
    assert scored.hits.tolist() == expected.tolist() != dense.hits.tolist()
    assert scored.prune_seconds > 0


def test_a_cell_is_scored_once(tmp_path: Path, samples: SampleSets) -> None:
    shipped = assets() / "run" / "statistics.safetensors"
    (tmp_path / "statistics.safetensors").write_bytes(shipped.read_bytes())
    run = Run(load_config(find_config("tiny")), tmp_path)
    asked = samples.test[:5]
    cells = [Cell("activation", (8,) * run.space.layers), Cell("flap", (8,) * run.space.layers, bias=True)]
    done: list[Any] = []

    def spread(build: Callable[[], Any], items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        for item in items:
            done.append(item)
            yield item, Scored(np.arange(len(asked)) % 2 == len(done) % 2, 0.25, 0.5)

    first = score_cells(run, cells[:1], asked, spread, progress=False)
    both = score_cells(run, cells, asked, spread, progress=False)
    assert done == cells
    assert both[cells[0]].hits.tolist() == first[cells[0]].hits.tolist() == [False, True, False, True, False]
    assert both[cells[1]].hits.tolist() == [True, False, True, False, True]
    score_cells(run, cells, samples.test[1:6], spread, progress=False)
    assert done == [*cells, *cells]  # On other samples they are others.
