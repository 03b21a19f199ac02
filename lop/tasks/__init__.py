"""The embedded benchmark as lmms-eval tasks: the functions that the YAML files beside this one name.

On lmms-eval's command line: `--include_path` with this folder, `--tasks lop_mmbench,lop_mme,lop_mmmu,lop_pope`.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

from PIL import Image

from lop.benchmark import METRICS, Verdict
from lop.samples import prompt_of

Doc = dict[str, Any]


def doc_to_visual(doc: Doc) -> list[Image.Image]:
    """The question's image."""
    return [Image.open(BytesIO(doc["image"])).convert("RGB")]


def doc_to_text(doc: Doc) -> str:
    """The question as LOP puts it, options included."""
    return prompt_of(doc["question"], doc["options"] or ())


def process_mmbench(doc: Doc, results: Sequence[str]) -> dict[str, Verdict]:
    """One verdict for each metric of MMBench."""
    return dict.fromkeys(("circular", "vanilla"), _verdict(doc, results))


def process_mme(doc: Doc, results: Sequence[str]) -> dict[str, Verdict]:
    """One verdict for each metric of MME."""
    return dict.fromkeys(("perception", "reasoning"), _verdict(doc, results))


def process_mmmu(doc: Doc, results: Sequence[str]) -> dict[str, Verdict]:
    """One verdict for MMMU's accuracy."""
    return {"accuracy": _verdict(doc, results)}


def process_pope(doc: Doc, results: Sequence[str]) -> dict[str, Verdict]:
    """One verdict for each metric of POPE."""
    return dict.fromkeys(("accuracy", "precision", "recall", "f1", "yes_rate"), _verdict(doc, results))


def circular(verdicts: Sequence[Verdict]) -> float:
    """MMBench's circular accuracy."""
    return METRICS["mmbench"](verdicts)["circular"]


def vanilla(verdicts: Sequence[Verdict]) -> float:
    """Accuracy without the rotations."""
    return METRICS["mmbench"](verdicts)["vanilla"]


def perception(verdicts: Sequence[Verdict]) -> float:
    """MME's perception score."""
    return METRICS["mme"](verdicts)["perception"]


def reasoning(verdicts: Sequence[Verdict]) -> float:
    """MME's reasoning score."""
    return METRICS["mme"](verdicts)["reasoning"]


def mmmu_accuracy(verdicts: Sequence[Verdict]) -> float:
    """MMMU's accuracy."""
    return METRICS["mmmu"](verdicts)["accuracy"]


def pope_accuracy(verdicts: Sequence[Verdict]) -> float:
    """POPE's accuracy."""
    return METRICS["pope"](verdicts)["accuracy"]


def pope_precision(verdicts: Sequence[Verdict]) -> float:
    """POPE's precision."""
    return METRICS["pope"](verdicts)["precision"]


def pope_recall(verdicts: Sequence[Verdict]) -> float:
    """POPE's recall."""
    return METRICS["pope"](verdicts)["recall"]


def pope_f1(verdicts: Sequence[Verdict]) -> float:
    """POPE's F1."""
    return METRICS["pope"](verdicts)["f1"]


def pope_yes_rate(verdicts: Sequence[Verdict]) -> float:
    """How often yes is said."""
    return METRICS["pope"](verdicts)["yes_rate"]


def _verdict(doc: Doc, results: Sequence[str]) -> Verdict:
    return Verdict(doc["group"], doc["part"], doc["answer"], results[0])
