"""Samples turned, once, into everything that a candidate's evaluation needs and pruning does not change."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lop.model.adapter import QwenVL
from lop.model.backbone import Group
from lop.model.image_settings import ImageSettings
from lop.model.samples import Sample, decode_image, prompt_text
from lop.model.vision import check_pixels, image_tower, patches_of

_CHUNK = 32


@dataclass(frozen=True)
class Batch:
    """Prompts with their answers, laid end to end without padding, those of equal length together.

    Attributes:
        embeddings: [N, H], image features in place.
        rotation: [N, D/2], complex: M-RoPE.
        is_image: [N] bool, where images' tokens are.
        grid: [N, 2] int32, M-RoPE's row and column of each token.
        groups: how many sequences of which length the N tokens are.
        tails: [M], the last tokens of each sequence, as many as the longest answer of its group has.
        places: [A], where in the tails the answers' tokens are predicted.
        tokens: [A], the right token at each of these places.
        samples: [A], the index of the sample that each belongs to.
    """

    embeddings: Tensor
    rotation: Tensor
    is_image: Tensor
    grid: Tensor
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

    def copied(self, device: torch.device) -> "Batch":
        """A copy on a device that gradients may be computed through: batches are encoded in inference mode."""
        tensors = {name: value.to(device, copy=True) for name, value in self.tensors().items()}
        return Batch(groups=self.groups, **tensors)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Encoded:
    """A set of samples, encoded.

    Attributes:
        rounds: batches that are scored together; one round unless the samples are raced.
        count: the number of samples.
        prose: the indices of the samples that are prose: their tokens have log-probabilities, and none is right or
            wrong.
    """

    rounds: tuple[tuple[Batch, ...], ...]
    count: int
    prose: tuple[int, ...] = ()

    @property
    def asked(self) -> np.ndarray:
        """[count] bool, which samples are questions, with a right answer: all but prose."""
        asked = np.ones(self.count, dtype=bool)
        asked[list(self.prose)] = False
        return asked

    @property
    def batches(self) -> tuple[Batch, ...]:
        """All batches, in order."""
        return tuple(batch for batches in self.rounds for batch in batches)


@dataclass(frozen=True)
class EncodedSample:
    """One sample's prompt with its answer, but for the last token, in host memory.

    Attributes:
        embeddings: [T, H], image features in place.
        positions: [3, T], M-RoPE's.
        rotation: [T, D/2], complex: what these positions turn queries and keys by.
        is_image: [T] bool, where an image's tokens are.
        answer: [A], the right tokens; the last A of the T places are where they are predicted.
    """

    embeddings: Tensor
    positions: Tensor
    rotation: Tensor
    is_image: Tensor
    answer: Tensor

    @property
    def length(self) -> int:
        return len(self.embeddings)


@torch.inference_mode()
def encode(
    model: QwenVL,
    samples: Sequence[Sample],
    *,
    batch_tokens: int,
    rounds: Sequence[np.ndarray] | None = None,
    images: ImageSettings | None = None,
) -> Encoded:
    """Runs processor, vision tower and embeddings once, and packs the sequences by length, in host memory.

    The answer's tokens and the end of turn follow the prompt, so one pass tells whether greedy generation would
    write exactly the answer. The last token is only predicted, never read. Prose is read as it stands, without the chat
    template and an end of turn.

    Memory: the sequences' embeddings, in the host's; of pixels and the tower's states never more than
    `images.batch_patches` or one image need, on the device.

    Args:
        batch_tokens: the most tokens of one batch (at least one sequence is always taken).
        rounds: the samples of each round, which partition them; one round of all samples by default.
        images: how images are read; as the processor says by default.

    Raises:
        LopError: the processor cannot make images as small as `images.max_pixels`.
    """
    sequences: list[EncodedSample | None] = list(encode_each(model, samples, images or ImageSettings()))
    parts = [np.arange(len(samples))] if rounds is None else rounds
    return Encoded(
        tuple(tuple(_batches(sequences, part.tolist(), batch_tokens)) for part in parts),
        len(samples),
        tuple(index for index, sample in enumerate(samples) if sample.is_prose),
    )


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


def _batches(sequences: list[EncodedSample | None], chosen: Sequence[int], batch_tokens: int) -> Iterator[Batch]:
    """Takes the chosen sequences out of the list as they are packed: no more than one batch is there twice."""
    lengths = {index: sequence.length for index in chosen if (sequence := sequences[index])}
    for together in by_length(lengths, batch_tokens):
        yield _pack(sequences, together)


def by_length(lengths: Mapping[int, int], batch_tokens: int) -> Iterator[list[int]]:
    """Sequences of like lengths together, at most `batch_tokens` of them unless one alone is longer.

    Args:
        lengths: tokens of each sequence, by its index.
    """
    waiting: list[int] = []
    tokens = 0
    for index in sorted(lengths, key=lengths.__getitem__):
        if waiting and tokens + lengths[index] > batch_tokens:
            yield waiting
            waiting, tokens = [], 0
        waiting.append(index)
        tokens += lengths[index]
    yield waiting


@torch.inference_mode()
def encode_each(model: QwenVL, samples: Sequence[Sample], images: ImageSettings) -> Iterator[EncodedSample]:
    """Each sample by itself, in order; see `encode`.

    Raises:
        LopError: the processor cannot make images as small as `images.max_pixels`.
    """
    check_pixels(model, images.max_pixels)
    uses = Counter(sample.image_key for sample in samples if sample.image)
    seen: dict[str, tuple[Tensor, Tensor]] = {}  # Each image's grid and features, until its last question.
    for chunk in _chunks(model, samples, images):
        new = {sample.image_key: sample.image for sample in chunk if sample.image and sample.image_key not in seen}
        if new:
            found = image_tower(model, [decode_image(image) for image in new.values()], images)
            seen |= dict(zip(new, found))
        yield from _sequences(model, chunk, [seen.get(sample.image_key, (None, None)) for sample in chunk])
        for sample in chunk:
            uses[sample.image_key] -= 1
            if not uses[sample.image_key]:
                seen.pop(sample.image_key, None)


def _chunks(model: QwenVL, samples: Sequence[Sample], images: ImageSettings) -> Iterator[list[Sample]]:
    """The samples in order, so many at a time as go through the tower together."""
    chunk: list[Sample] = []
    keys: set[str] = set()
    patches = 0
    for sample in samples:
        more = (
            patches_of(model, sample.image, images.max_pixels) if sample.image and sample.image_key not in keys else 0
        )
        if chunk and (len(chunk) == _CHUNK or patches + more > images.batch_patches):
            yield chunk
            chunk, keys, patches = [], set(), 0
        chunk.append(sample)
        keys.add(sample.image_key)
        patches += more
    if chunk:
        yield chunk


def chat_text(model: QwenVL, prompt: str, *, images: int = 1) -> str:
    """What the model reads before it answers a user who shows images and says `prompt`."""
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    return str(model.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _sequences(
    model: QwenVL, samples: Sequence[Sample], images: Sequence[tuple[Tensor | None, Tensor | None]]
) -> Iterator[EncodedSample]:
    """Samples, encoded: together, as each word with the device takes longer than what it is asked.

    Args:
        images: of each sample the patches in time, height and width, [1, 3], and the embeddings, [tokens, H]; None
            without an image.
    """
    read = [_tokens(model, sample, features) for sample, (_, features) in zip(samples, images)]
    ids = [torch.tensor([*prompt, *answer[:-1]]) for prompt, answer in read]
    is_image = [tokens == model.processor.image_token_id for tokens in ids]
    positions = [
        model.positions(tokens, where.int(), None if grid is None else grid.cpu())
        for tokens, where, (grid, _) in zip(ids, is_image, images)
    ]
    lengths = [len(tokens) for tokens in ids]
    embeddings = model.token_embeddings(torch.cat(ids).to(model.device)).cpu()
    rotation = model.rotation(torch.cat(positions, 1).to(model.device)).cpu()
    parts = zip(embeddings.split(lengths), positions, rotation.split(lengths), is_image)
    for (_, answer), (_, features), (embedded, position, turned, where) in zip(read, images, parts):
        if features is not None:
            embedded[where] = features.to("cpu", embedded.dtype)
        # Copies: what they are parts of goes when the chunk does.
        yield EncodedSample(embedded.clone(), position, turned.clone(), where, torch.tensor(answer))


def _tokens(model: QwenVL, sample: Sample, features: Tensor | None) -> tuple[list[int], list[int]]:
    """The tokens of a sample's prompt, its image's as many as there are features, and of its answer."""
    tokenizer = model.processor.tokenizer
    answer = tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    if sample.is_prose:
        return tokenizer(sample.question, add_special_tokens=False)["input_ids"] or [_document_start(tokenizer)], answer
    text = chat_text(model, prompt_text(sample), images=int(features is not None))
    if features is not None:
        text = text.replace(model.processor.image_token, model.processor.image_token * len(features))
    return tokenizer(text)["input_ids"], [*answer, tokenizer.eos_token_id]


def _document_start(tokenizer: Any) -> int:
    """The token that prose without a context follows: the first token, too, must be predicted from something."""
    tokens = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next(token for token in tokens if token is not None)


def _pack(sequences: list[EncodedSample | None], chosen: Sequence[int]) -> Batch:
    """One batch of sequences that are sorted by length; they are taken out of the list."""
    packed = [sequence for index in chosen if (sequence := sequences[index])]
    for index in chosen:
        sequences[index] = None
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
        is_image=torch.cat([sequence.is_image for sequence in packed]),
        grid=torch.cat([sequence.positions[1:].T.int() for sequence in packed]),
        groups=tuple(groups),
        tails=_ranges(ends - tails, ends),
        places=_ranges(tail_ends - [len(sequence.answer) for sequence in packed], tail_ends),
        tokens=torch.cat([sequence.answer for sequence in packed]),
        samples=torch.tensor([index for index, sequence in zip(chosen, packed) for _ in sequence.answer]),
    )


def _ranges(starts: np.ndarray, ends: np.ndarray) -> Tensor:
    return torch.cat([torch.arange(start, end) for start, end in zip(starts, ends)])
