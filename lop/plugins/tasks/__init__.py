"""The embedded benchmark as lmms-eval tasks: the functions that the YAML files beside this one name.

On lmms-eval's command line: `--include_path` with this folder, `--tasks lop_mmbench,lop_mme,lop_mmmu,lop_pope`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lop.model.samples import Sample, decode_image, prompt_text, sample_of
from lop.report.benchmark import METRICS, Verdict

Doc = dict[str, Any]


def doc_to_visual(doc: Doc) -> list[Image.Image]:
    """The question's image; none where it is about text alone."""
    sample = _sample(doc)
    return [decode_image(sample.image)] if sample.image else []


def doc_to_text(doc: Doc) -> str:
    """The question as LOP puts it, options included."""
    return prompt_text(_sample(doc))


def _sample(doc: Doc) -> Sample:
    return sample_of(doc, Path())


def _process(*metrics: str) -> Callable[[Doc, Sequence[str]], dict[str, Verdict]]:
    """One verdict for each of a task's metrics."""

    def process(doc: Doc, results: Sequence[str]) -> dict[str, Verdict]:
        return dict.fromkeys(metrics, Verdict(doc["group"], doc["part"], _sample(doc).answer, results[0]))

    return process


def _metric(task: str, name: str) -> Callable[[Sequence[Verdict]], float]:
    """One of a task's metrics of all its verdicts."""
    return lambda verdicts: METRICS[task](verdicts)[name]


process_mmbench = _process("circular", "vanilla")
circular, vanilla = _metric("mmbench", "circular"), _metric("mmbench", "vanilla")

process_mme = _process("perception", "reasoning")
perception, reasoning = _metric("mme", "perception"), _metric("mme", "reasoning")

process_mmmu = _process("accuracy")
mmmu_accuracy = _metric("mmmu", "accuracy")

process_pope = _process("accuracy", "precision", "recall", "f1", "yes_rate")
pope_accuracy, pope_precision, pope_recall = (_metric("pope", name) for name in ("accuracy", "precision", "recall"))
pope_f1, pope_yes_rate = _metric("pope", "f1"), _metric("pope", "yes_rate")
