"""Which samples each step of training reads, and how they are laid side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lop.distil.loss import Likeliest
from lop.distil.teacher import Note
from lop.model.encoding import EncodedSample

# Places of a batch that may hold no token, as a share of those that do.
_PADDING = 0.25


def steps_of(
    lengths: Sequence[int], *, tokens: int, batch_tokens: int, seed: int, processes: int = 1
) -> list[list[int]]:
    """The samples of each step: shuffled anew each time all have been read, until `tokens` have been.

    Args:
        lengths: tokens of each sample.
        batch_tokens: of a step, about: its last sample goes beyond.
        processes: of which each needs one sample.
    """
    random = np.random.default_rng(seed)
    steps: list[list[int]] = []
    waiting: list[int] = []
    read = held = 0
    while read < tokens:
        for index in random.permutation(len(lengths)).tolist():
            waiting.append(index)
            held += lengths[index]
            read += lengths[index]
            if (held >= batch_tokens or read >= tokens) and len(waiting) >= processes:
                steps.append(waiting)
                waiting, held = [], 0
                if read >= tokens:
                    break
    return steps


def side_by_side(indices: Sequence[int], lengths: Sequence[int], *, batch_tokens: int) -> list[list[int]]:
    """Samples of like lengths together, so that little of a batch is padding, and none is larger than a step."""
    batches: list[list[int]] = []
    held = 0
    for index in sorted(indices, key=lambda index: lengths[index]):
        length = lengths[index]
        places = length * (len(batches[-1]) + 1) if batches else 0
        if not batches or places > (1 + _PADDING) * (held + length) or places > batch_tokens:
            batches.append([])
            held = 0
        batches[-1].append(index)
        held += length
    return batches


@dataclass(frozen=True)
class Lesson:
    """A batch of samples, padded at the end to B × T places, with what the teacher says to the P that are text.

    Attributes:
        embeddings: [B, T, H].
        positions: [3, B, T].
        mask: [B, T], 1 where there are tokens; None if everywhere.
        text: [B, T] bool, the P places.
        weights: [P], what each counts.
        likeliest: of the P places.
        states: [layers, P, H].
    """

    embeddings: Tensor
    positions: Tensor
    mask: Tensor | None
    text: Tensor
    weights: Tensor
    likeliest: Likeliest
    states: Tensor


def lesson(samples: Sequence[EncodedSample], notes: Sequence[Note], *, prompt: float, device: torch.device) -> Lesson:
    """Samples with their notes, on a device.

    Args:
        prompt: what the place of a prompt's token counts, where an answer's counts 1.
    """
    longest = max(sample.length for sample in samples)
    shape = (len(samples), longest)
    embeddings = samples[0].embeddings.new_zeros(*shape, samples[0].embeddings.shape[1])
    positions = torch.zeros(3, *shape, dtype=torch.long)
    mask, text = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    weights = torch.full(shape, prompt)
    for row, sample in enumerate(samples):
        length = sample.length
        embeddings[row, :length] = sample.embeddings
        positions[:, row, :length] = sample.positions
        mask[row, :length] = 1
        text[row, :length] = ~sample.is_image
        weights[row, length - len(sample.answer) : length] = 1
    found = [note.likeliest for note in notes]
    return Lesson(
        embeddings.to(device),
        positions.to(device),
        None if bool(mask.all()) else mask.to(device),
        text.to(device),
        weights[text].to(device),
        Likeliest(
            *(
                torch.cat([getattr(part, name) for part in found]).to(device)
                for name in ("log_probabilities", "tokens", "rest")
            )
        ),
        torch.cat([note.states for note in notes], 1).to(device),
    )


def weight_of(sample: EncodedSample, *, prompt: float) -> float:
    """What a sample's places count together."""
    answer = len(sample.answer)
    return answer + prompt * (int((~sample.is_image).sum()) - answer)
