"""Which samples each step of training reads, and how they are laid end to end."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lop.distil.loss import Likeliest
from lop.distil.teacher import Note
from lop.model.backbone import Group
from lop.model.encoding import EncodedSample


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


@dataclass(frozen=True)
class Lesson:
    """Samples laid end to end, N places, with what the teacher says to the P that are text.

    Attributes:
        embeddings: [N, H].
        rotation: [N, D/2], complex: M-RoPE.
        groups: how many samples of which length the N places are.
        text: [N] bool, the P places.
        weights: [P], what each counts.
        likeliest: of the P places.
        states: [layers, P, H].
    """

    embeddings: Tensor
    rotation: Tensor
    groups: tuple[Group, ...]
    text: Tensor
    weights: Tensor
    likeliest: Likeliest
    states: Tensor

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Lesson":
        """The lesson with its tensors somewhere else."""
        moved = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        likeliest = Likeliest(**{name: move(value) for name, value in vars(self.likeliest).items()})
        return Lesson(groups=self.groups, likeliest=likeliest, **moved)


def lesson(samples: Sequence[EncodedSample], notes: Sequence[Note], *, prompt: float) -> Lesson:
    """Samples with their notes, in host memory.

    Args:
        prompt: what the place of a prompt's token counts, where an answer's counts 1.
    """
    pairs = sorted(zip(samples, notes, strict=True), key=lambda pair: pair[0].length)
    samples = [sample for sample, _ in pairs]
    told = [note.likeliest for _, note in pairs]
    lengths = [sample.length for sample in samples]
    ends = np.cumsum(lengths)
    weights = torch.full((int(ends[-1]),), prompt)
    for sample, end in zip(samples, ends.tolist()):
        weights[end - len(sample.answer) : end] = 1
    text = ~torch.cat([sample.is_image for sample in samples])
    return Lesson(
        embeddings=torch.cat([sample.embeddings for sample in samples]),
        rotation=torch.cat([sample.rotation for sample in samples]),
        groups=tuple(Group(count, length, length) for length, count in Counter(lengths).items()),
        text=text,
        weights=weights[text],
        likeliest=Likeliest(
            *(torch.cat([getattr(part, name) for part in told]) for name in ("log_probabilities", "tokens", "rest"))
        ),
        states=torch.cat([note.states for _, note in pairs], 1),
    )


def weight_of(sample: EncodedSample, *, prompt: float) -> float:
    """What a sample's places count together."""
    answer = len(sample.answer)
    return answer + prompt * (int((~sample.is_image).sum()) - answer)
