"""Samples turned, once, into everything that a candidate's evaluation needs and pruning does not change."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from lop.adapter import QwenVL
from lop.backbone import Group
from lop.samples import Sample, decode_image, prompt_text

_CHUNK = 32


@dataclass(frozen=True)
class Batch:
    """Prompts with their answers, laid end to end without padding, those of equal length together.

    Attributes:
        embeddings: [N, H], image features in place.
        rotation: [N, D/2], complex: M-RoPE.
        groups: how many sequences of which length the N tokens are.
        tails: [M], the last tokens of each sequence, as many as the longest answer of its group has.
        places: [A], where in the tails the answers' tokens are predicted.
        tokens: [A], the right token at each of these places.
        samples: [A], the index of the sample that each belongs to.
    """

    embeddings: Tensor
    rotation: Tensor
    groups: tuple[Group, ...]
    tails: Tensor
    places: Tensor
    tokens: Tensor
    samples: Tensor

    def __len__(self) -> int:
        return len(self.embeddings)

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device. To a GPU the copies are asynchronous, on the current stream."""
        if device.type == self.embeddings.device.type:
            return self
        moved = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in self.tensors().items()}
        return Batch(groups=self.groups, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Encoded:
    """A set of samples, encoded.

    Attributes:
        rounds: batches that are scored together; one round unless the samples are raced.
        count: the number of samples.
    """

    rounds: tuple[tuple[Batch, ...], ...]
    count: int

    @property
    def batches(self) -> tuple[Batch, ...]:
        """All batches, in order."""
        return tuple(batch for batches in self.rounds for batch in batches)


@dataclass(frozen=True)
class _Sequence:
    embeddings: Tensor
    rotation: Tensor
    answer: Tensor

    @property
    def length(self) -> int:
        return len(self.embeddings)


@torch.inference_mode()
def encode(
    model: QwenVL, samples: Sequence[Sample], *, batch_tokens: int, rounds: Sequence[np.ndarray] | None = None
) -> Encoded:
    """Runs processor, vision tower and embeddings once, and packs the sequences by length, in host memory.

    The answer's tokens and the end of turn follow the prompt, so one pass tells whether greedy generation would
    write exactly the answer. The last token is only predicted, never read.

    Args:
        batch_tokens: the most tokens of one batch (at least one sequence is always taken).
        rounds: the samples of each round, which partition them; one round of all samples by default.
    """
    sequences = list(_sequences(model, samples))
    parts = [np.arange(len(samples))] if rounds is None else rounds
    return Encoded(tuple(tuple(_batches(sequences, part.tolist(), batch_tokens)) for part in parts), len(samples))


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on a device; to a GPU each one is copied while the one before it is worked on."""
    if device.type != "cuda":
        yield from batches
        return
    copies, work = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    previous: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            coming = batch.to(device)
            arrived = copies.record_event()
        if previous is not None:
            yield previous
        work.wait_event(arrived)
        for tensor in coming.tensors().values():
            tensor.record_stream(work)  # So that its memory is not taken again while the work goes on.
        previous = coming
    if previous is not None:
        yield previous


def _batches(sequences: Sequence[_Sequence], chosen: Sequence[int], batch_tokens: int) -> Iterator[Batch]:
    waiting: list[int] = []
    tokens = 0
    for index in sorted(chosen, key=lambda index: sequences[index].length):
        if waiting and tokens + sequences[index].length > batch_tokens:
            yield _pack(sequences, waiting)
            waiting, tokens = [], 0
        waiting.append(index)
        tokens += sequences[index].length
    yield _pack(sequences, waiting)


def _sequences(model: QwenVL, samples: Sequence[Sample]) -> Iterator[_Sequence]:
    tokenizer = model.processor.tokenizer
    features: dict[str, Tensor] = {}
    for start in range(0, len(samples), _CHUNK):
        chunk = samples[start : start + _CHUNK]
        inputs = model.processor(
            text=[chat_text(model, prompt_text(sample)) for sample in chunk],
            images=[decode_image(sample.image) for sample in chunk],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        ).to(model.device)
        patches = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(-1).tolist())
        new = {sample.image_key: index for index, sample in enumerate(chunk) if sample.image_key not in features}
        if new:
            pixels = torch.cat([patches[index] for index in new.values()])
            found = model.image_features(pixels, inputs["image_grid_thw"][list(new.values())])
            features |= dict(zip(new, found))
        for index, sample in enumerate(chunk):
            real = inputs["attention_mask"][index].bool()
            answer = tokenizer(sample.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            yield _sequence(
                model,
                ids=inputs["input_ids"][index][real],
                types=inputs["mm_token_type_ids"][index][real],
                grid=inputs["image_grid_thw"][index : index + 1],
                answer=torch.tensor(answer, device=model.device),
                features=features[sample.image_key],
            )


def chat_text(model: QwenVL, prompt: str, *, images: int = 1) -> str:
    """What the model reads before it answers a user who shows images and says `prompt`."""
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    return str(model.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _sequence(
    model: QwenVL, *, ids: Tensor, types: Tensor, grid: Tensor, answer: Tensor, features: Tensor
) -> _Sequence:
    ids = torch.cat([ids, answer[:-1]])
    types = torch.cat([types, torch.zeros_like(answer[:-1], dtype=types.dtype)])
    embeddings = model.token_embeddings(ids)
    embeddings[types == 1] = features.to(embeddings.dtype)
    rotation = model.rotation(model.positions(ids, types, grid))
    return _Sequence(embeddings.cpu(), rotation.cpu(), answer.cpu())


def _pack(sequences: Sequence[_Sequence], chosen: Sequence[int]) -> Batch:
    """One batch of sequences that are sorted by length."""
    packed = [sequences[index] for index in chosen]
    groups = []
    for length, members in groupby(packed, key=lambda sequence: sequence.length):
        answers = [len(member.answer) for member in members]
        groups.append(Group(len(answers), length, max(answers)))
    tails = [group.tail for group in groups for _ in range(group.count)]
    ends = np.cumsum([sequence.length for sequence in packed])
    tail_ends = np.cumsum(tails)
    return Batch(
        embeddings=torch.cat([sequence.embeddings for sequence in packed]),
        rotation=torch.cat([sequence.rotation for sequence in packed]),
        groups=tuple(groups),
        tails=_ranges(ends - tails, ends),
        places=_ranges(tail_ends - [len(sequence.answer) for sequence in packed], tail_ends),
        tokens=torch.cat([sequence.answer for sequence in packed]),
        samples=torch.tensor([index for index, sequence in zip(chosen, packed) for _ in sequence.answer]),
    )


def _ranges(starts: np.ndarray, ends: np.ndarray) -> Tensor:
    return torch.cat([torch.arange(start, end) for start, end in zip(starts, ends)])
