"""What a refit will take, told before it starts: from the model's shapes, a few samples and a quick measurement."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lop.model.adapter import QwenVL
from lop.model.encoding import chat_text
from lop.model.samples import Sample, prompt_text
from lop.model.vision import patches_of
from lop.terminal import duration

log = logging.getLogger(__name__)
_LOOKED_AT = 32
_SECONDS_WORTH_TELLING = 10
# Bytes of weights that are read, converted and sorted in a second, all in all: about what one core does.
_BYTES_A_SECOND = 5e8
# Of the rate of a large product: what a backbone's arithmetic comes to, attention and norms between its products
# (docs/evaluation.md has both).
_REACHED = {"cuda": 0.8, "cpu": 0.45}
# Fewer tokens than this for each neuron kept, and a fit follows its samples where it should follow the model.
_TOKENS_A_NEURON = 4


@dataclass(frozen=True)
class Load:
    """What the samples put through the model.

    Attributes:
        patches: of all different images, for the vision tower.
        longest: of the largest image seen.
        tokens: of all sequences, for the decoder layers.
    """

    patches: int
    longest: int
    tokens: int


@dataclass(frozen=True)
class Rates:
    """Operations that a device does in a second: of a model in its dtype, of products in float32 and in float64."""

    own: float
    single: float
    double: float


def tell_refit(
    model: QwenVL, samples: Sequence[Sample], widths: Sequence[int], *, max_pixels: int | None = None
) -> None:
    """Says how long a refit of the widths will take, if that is worth telling, and warns if the samples are few for it.

    Args:
        model: its vision tower must be in memory; of the decoder layers only the shapes are looked at.
        max_pixels: as in the config.
    """
    load, rates = (
        sample_load(model, samples, max_pixels=max_pixels),
        measured_rates(model.tower.device, model.tower.dtype),
    )
    seconds = refit_seconds(model, load, widths, rates)
    if seconds >= _SECONDS_WORTH_TELLING:
        log.info(
            "refit: about %s on %s (%d samples, some %s tokens and %s patches, %d layers); --recovery none skips it",
            duration(seconds),
            model.tower.device,
            len(samples),
            f"{load.tokens:,}",
            f"{load.patches:,}",
            len(widths),
        )
    if load.tokens < _TOKENS_A_NEURON * max(widths):
        log.warning(
            "refit: some %s calibration tokens are few for layers of up to %s neurons: better give it %s and more "
            "(samples: README, 'Your own samples'), or take --recovery none",
            f"{load.tokens:,}",
            f"{max(widths):,}",
            f"{_TOKENS_A_NEURON * max(widths):,}",
        )


def sample_load(model: QwenVL, samples: Sequence[Sample], *, max_pixels: int | None = None) -> Load:
    """The load of all samples, extrapolated from a few that are spread evenly over them."""
    chosen = samples[:: max(1, len(samples) // _LOOKED_AT)]
    tokenizer = model.processor.tokenizer
    patches, text = [], []
    for sample in chosen:
        if sample.image:
            patches.append(patches_of(model, sample.image, max_pixels))
        prompt = chat_text(model, prompt_text(sample), images=1 if sample.image else 0)
        text.append(len(tokenizer(prompt + sample.answer)["input_ids"]))
    images = len({sample.image_key for sample in samples if sample.image})
    merged = sum(patches) // model.family.patches_per_token(model.processor)
    return Load(
        patches=images * sum(patches) // max(len(patches), 1),
        longest=max(patches, default=0),
        tokens=len(samples) * (merged + sum(text)) // len(chosen),
    )


def refit_seconds(model: QwenVL, load: Load, widths: Sequence[int], rates: Rates) -> float:
    """Counts the operations of `recovery.refit` and of encoding its samples: two for each weight and token.

    From the first that lost neurons on, each layer runs on the dense model's states and on the pruned one's; one that
    lost neurons is whole for both, makes `G` and `T`, and solves for its weights.
    """
    text, vision = model.model.config.text_config, model.model.config.vision_config
    tower = sum(parameter.numel() for parameter in model.tower.parameters())
    whole = 4 * model.family.whole_attention(vision) * load.patches * load.longest
    own, single, double = 2.0 * tower * load.patches + whole, 0.0, 0.0
    hidden, neurons, tokens = text.hidden_size, text.intermediate_size, load.tokens
    head = hidden // text.num_attention_heads
    attention = 2 * hidden * hidden + 2 * hidden * head * text.num_key_value_heads
    stored, differs = 0, False
    for width in widths:
        differs = differs or width < neurons
        own += 2 * tokens * (attention + 3 * hidden * neurons)
        if differs:
            own += 2 * tokens * (attention + 3 * hidden * width)
        if width < neurons:
            own += 2 * tokens * 3 * hidden * neurons
            single += 2 * tokens * width * (width + hidden)
            double += 2 * hidden * width**2 + width**3 / 3
        stored += (attention + 3 * hidden * neurons) * model.tower.dtype.itemsize
    return own / rates.own + single / rates.single + double / rates.double + stored / _BYTES_A_SECOND


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Times one product of square matrices in each precision, about a tenth of a second on one core."""
    size = 4096 if device.type == "cuda" else 1024

    def rate(kind: torch.dtype) -> float:
        matrix = torch.ones(size, size, dtype=kind, device=device)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # Which waits for it.
            seconds.append(time.perf_counter() - start)
        return 2 * size**3 / min(seconds)

    return Rates(_REACHED.get(device.type, 1.0) * rate(dtype), rate(torch.float32), rate(torch.float64))
