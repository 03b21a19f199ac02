"""Samples turned, once, into everything that a candidate's evaluation needs and pruning does not change."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from lop.adapter import QwenVL
from lop.samples import Sample, prompt_text

_CHUNK = 32


@dataclass(frozen=True)
class Batch:
    """Sequences of similar length: prompts with their answers, padded on the right.

    Attributes:
        embeddings: [B, T, H], image features in place.
        positions: [3, B, T], M-RoPE.
        lengths: [B], tokens before the padding.
        rows, columns: [N], where the answer's tokens are predicted.
        tokens: [N], the right token at each of these places.
        samples: [N], the index of the sample that each belongs to.
    """

    embeddings: Tensor
    positions: Tensor
    lengths: Tensor
    rows: Tensor
    columns: Tensor
    tokens: Tensor
    samples: Tensor

    @property
    def real(self) -> Tensor:
        """[B, T], true where a token is no padding."""
        return torch.arange(self.embeddings.shape[1], device=self.lengths.device) < self.lengths[:, None]


@dataclass(frozen=True)
class Encoded:
    """All batches of a set of samples, with the number of samples."""

    batches: tuple[Batch, ...]
    count: int


@dataclass(frozen=True)
class _Sequence:
    embeddings: Tensor
    positions: Tensor
    answer: Tensor

    @property
    def length(self) -> int:
        return self.embeddings.shape[0]


@torch.inference_mode()
def encode(model: QwenVL, samples: Sequence[Sample], *, batch_tokens: int) -> Encoded:
    """Runs processor, vision tower and embeddings once, and packs the sequences by length.

    The answer's tokens and the end of turn follow the prompt, so one pass tells whether greedy generation would
    write exactly the answer. The last token is only predicted, never read.

    Args:
        batch_tokens: the most tokens, padding included, of one batch (at least one sequence is always taken).
    """
    sequences = list(_sequences(model, samples))
    order = sorted(range(len(sequences)), key=lambda index: sequences[index].length)
    batches = []
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * sequences[order[end]].length <= batch_tokens:
            end += 1
        batches.append(_pack(sequences, order[start:end]))
        start = end
    return Encoded(tuple(batches), len(samples))


def _sequences(model: QwenVL, samples: Sequence[Sample]) -> Iterator[_Sequence]:
    tokenizer = model.processor.tokenizer
    features: dict[str, Tensor] = {}
    for start in range(0, len(samples), _CHUNK):
        chunk = samples[start : start + _CHUNK]
        inputs = model.processor(
            text=[_chat(model, sample) for sample in chunk],
            images=[Image.open(BytesIO(sample.image)).convert("RGB") for sample in chunk],
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


def _chat(model: QwenVL, sample: Sample) -> str:
    content = [{"type": "image"}, {"type": "text", "text": prompt_text(sample)}]
    messages = [{"role": "user", "content": content}]
    return str(model.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _sequence(
    model: QwenVL, *, ids: Tensor, types: Tensor, grid: Tensor, answer: Tensor, features: Tensor
) -> _Sequence:
    ids = torch.cat([ids, answer[:-1]])
    types = torch.cat([types, torch.zeros_like(answer[:-1], dtype=types.dtype)])
    embeddings = model.token_embeddings(ids)
    embeddings[types == 1] = features.to(embeddings.dtype)
    return _Sequence(embeddings, model.positions(ids, types, grid), answer)


def _pack(sequences: Sequence[_Sequence], chosen: Sequence[int]) -> Batch:
    longest = max(sequences[index].length for index in chosen)
    first = sequences[chosen[0]].embeddings
    embeddings = first.new_zeros(len(chosen), longest, first.shape[1])
    positions = sequences[chosen[0]].positions.new_zeros(3, len(chosen), longest)
    rows, columns, tokens, owners = [], [], [], []
    for row, index in enumerate(chosen):
        sequence = sequences[index]
        embeddings[row, : sequence.length] = sequence.embeddings
        positions[:, row, : sequence.length] = sequence.positions
        answer = sequence.answer
        places = torch.arange(sequence.length - len(answer), sequence.length, device=answer.device)
        rows.append(torch.full_like(answer, row))
        columns.append(places)
        tokens.append(answer)
        owners.append(torch.full_like(answer, index))
    lengths = torch.tensor([sequences[index].length for index in chosen], device=first.device)
    return Batch(
        embeddings, positions, lengths, torch.cat(rows), torch.cat(columns), torch.cat(tokens), torch.cat(owners)
    )
