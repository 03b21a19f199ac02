"""What each method needs beside the weights, in words, for the reports."""

from collections.abc import Collection

from lop.methods.method import Need
from lop.run.surveys import extra_bytes
from lop.space.size import ModelSize

_WORDS = {
    Need.ACTIVATIONS: "activations",
    Need.SPECTRA: "spectra of the weights",
    Need.SEQUENCES: "means by sequence",
    Need.GRADIENTS: "gradients",
    Need.REMOVAL: "inverse Gram matrices",
    Need.EVALUATIONS: "evaluations",
    Need.SEARCH: "LOP's search",
    Need.PREDICTOR: "LOP's predictor",
}


def needs_in_words(needs: Collection[Need], size: ModelSize) -> str:
    """What the needs are, and the memory that the largest takes beside what calibration takes."""
    words = ", ".join(word for need, word in _WORDS.items() if need in needs) or "weights alone"
    extra = extra_bytes(size, needs)
    return f"{words} ({extra / 1e9:.2g} GB)" if extra else words
