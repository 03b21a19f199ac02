"""Measures a checkpoint on the test samples and writes its model card.

python -m training.tiny.card [--model FOLDER] [--samples FOLDER] [--quick]
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lop.model.adapter import load_model
from lop.model.elastic import ElasticModel
from lop.model.encoding import encode
from lop.model.importance import importance, order
from lop.model.samples import Sample, load_sample_sets
from lop.model.statistics import calibrate
from lop.model.tensors import model_size
from lop.search.evaluator import Evaluator
from lop.space.allocation import Allocation, Space, dense, uniform
from lop.storage.headers import read_tensors

_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
_ALONE = 0.75
_FORMS = ("word", "choice", "yes_no")
_BATCH_TOKENS = 4096
_GRANULARITY, _MAX_RATIO = 8, 0.95
_INTRODUCTION = """---
license: mit
pipeline_tag: image-text-to-text
---

# tiny

A complete small Qwen2.5-VL (12 decoder layers × 72 with FFNs of 160, 3 heads on 1; a vision tower of 4 layers × 64;
four image tokens), trained from scratch so that LOP can be tried, tested and measured without a download. It answers
questions about coloured shapes, products and flags: by an option's letter, by yes or no, or in one word.

Trained by `training/tiny` (its README says how) on easy-VQA (MIT), Fashion-MNIST (MIT), flags from Debian's
`iso-flags-png-320x240` (public domain) and facts from `countryinfo` (MIT). It is of no use beyond such questions, and
its facts are those of its sources, some of them out of date.

## Measured

Share of exact answers in percent, greedy, on the test samples: images, or renderings of flags, that neither training
nor calibration nor the search has seen. The weights are measured as they ship, in float32 arithmetic. Pruning keeps the
neurons whose activations have the largest L2 norm on the calibration samples. Made by `python -m training.tiny.card`.
"""


@dataclass(frozen=True)
class Figures:
    """What the card reports.

    Attributes:
        dense: [n] bool, which test questions the unpruned model answers exactly.
        uniform: the same for each ratio, all layers pruned alike.
        alone: the same for each layer, only that one pruned.
    """

    dense: np.ndarray
    uniform: dict[float, np.ndarray]
    alone: list[np.ndarray]


def main() -> None:
    """Measures, prints and writes `README.md` beside the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("lop/assets/tiny/model"))
    parser.add_argument("--samples", type=Path, default=Path("lop/assets/tiny/samples"))
    parser.add_argument("--quick", action="store_true", help="only print, and only a few of the figures")
    options = parser.parse_args()
    sets = load_sample_sets(options.samples)
    text = _tables(measure(options.model, sets.calibration, sets.test, quick=options.quick), sets.test)
    print(text)
    if not options.quick:
        (options.model / "README.md").write_text(f"{_INTRODUCTION}\n{text}\n")


def measure(folder: Path, calibration: Sequence[Sample], test: Sequence[Sample], *, quick: bool = False) -> Figures:
    """Scores the checkpoint in float32 arithmetic, dense and pruned by the L2 norm of the activations."""
    model = load_model(folder, device="cpu", dtype="float32")
    statistics = calibrate(model, encode(model, calibration, batch_tokens=_BATCH_TOKENS), progress=False)
    elastic = ElasticModel(model, order(importance("activation", statistics)))
    evaluator = Evaluator(elastic, encode(model, test, batch_tokens=_BATCH_TOKENS))
    size = model_size(read_tensors(folder))
    space = Space(size.layers, size.neurons, _GRANULARITY, _MAX_RATIO)

    def score(allocation: Allocation) -> np.ndarray:
        with elastic.pruned(allocation):
            return evaluator.scores().correct

    kept = round((1 - _ALONE) * size.neurons / _GRANULARITY) * _GRANULARITY
    return Figures(
        dense=score(dense(space)),
        uniform={ratio: score(uniform(space, space.budget(ratio))) for ratio in ((0.3, 0.5) if quick else _RATIOS)},
        alone=[
            score(Allocation(tuple(kept if layer == pruned else size.neurons for layer in range(size.layers))))
            for pruned in range(size.layers)
        ],
    )


def _tables(figures: Figures, test: Sequence[Sample]) -> str:
    """Accuracy in percent by form and by kind, dense and pruned."""
    form = np.array([sample.form for sample in test])
    kind = np.array([sample.kind for sample in test])

    def row(name: str, correct: np.ndarray, chosen: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> list[str]:
        cells = [f"{100 * chosen(correct).mean():.1f}"]
        cells += [_percent(chosen(correct & (form == f)), chosen(form == f)) for f in _FORMS]
        return [name, *cells]

    kinds = [
        [k, _percent(figures.dense & (kind == k), kind == k)]
        + [_percent(figures.dense & (kind == k) & (form == f), (kind == k) & (form == f)) for f in _FORMS]
        for k in dict.fromkeys(kind.tolist())
    ]
    uniform = [row(f"{ratio:.0%}", correct) for ratio, correct in figures.uniform.items()]
    alone = [row(str(layer), correct) for layer, correct in enumerate(figures.alone)]
    head = ["all", *(f"`{f}`" for f in _FORMS)]
    return "\n\n".join(
        [
            "### Dense, by kind of question",
            _table(["kind", *head], [*kinds, row("**all**", figures.dense)]),
            "### Every layer pruned alike",
            _table(["ratio", *head], [row("0%", figures.dense), *uniform]),
            f"### One layer alone pruned by {_ALONE:.0%}",
            _table(["layer", *head], alone),
        ]
    )


def _percent(right: np.ndarray, asked: np.ndarray) -> str:
    return f"{100 * right.sum() / asked.sum():.1f}" if asked.any() else "–"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
