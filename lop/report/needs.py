"""What each method needs beside the weights, and why some leave no checkpoint, in words, for the reports."""

from collections.abc import Collection, Iterable

from lop.methods.method import Need
from lop.methods.registry import RESHAPINGS
from lop.run.surveys import SURVEYS
from lop.space.size import ModelSize

_WORDS = {
    Need.ACTIVATIONS: "activations",
    Need.SPECTRA: "spectra of the weights",
    Need.SEQUENCES: "means by sequence",
    Need.GRADIENTS: "gradients",
    Need.ATTENTION: "attention weights",
    Need.STATES: "states",
    Need.TRAINING: "training on them",
    Need.REMOVAL: "inverse Gram matrices",
    Need.EVALUATIONS: "evaluations",
    Need.SEARCH: "LOP's search",
    Need.PREDICTOR: "LOP's predictor",
}


def needs_in_words(needs: Collection[Need], size: ModelSize) -> str:
    """What the needs are, each with the memory that it takes on top of what calibration takes."""
    return ", ".join(_in_words(need, size) for need in _WORDS if need in needs) or "weights alone"


def without_checkpoint(methods: Iterable[str]) -> list[str]:
    """A line that says which of the methods have none, and why; no line if all have one."""
    why = [(name, RESHAPINGS[name].not_exported) for name in dict.fromkeys(methods) if name in RESHAPINGS]
    found = ", ".join(f"`{name}` ({reason})" for name, reason in why if reason)
    return [f"No checkpoint can be written of {found}."] if found else []


def _in_words(need: Need, size: ModelSize) -> str:
    extra = SURVEYS[need.value].memory(size) if need.value in SURVEYS else 0
    return f"{_WORDS[need]} ({extra / 1e9:.2g} GB)" if extra else _WORDS[need]
