"""Greedy answers, written token by token."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from lop.model.adapter import QwenVL
from lop.model.encoding import chat_text
from lop.model.samples import Sample, decode_image, prompt_text

_NEW_TOKENS = 32


@torch.inference_mode()
def generate(
    model: QwenVL, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], *, new_tokens: int
) -> list[str]:
    """Each prompt's answer, all in one batch.

    Args:
        prompts: what the user says, without the chat template.
        images: each prompt's images, which come before its text.
        new_tokens: the most tokens of an answer.
    """
    inputs = encode_prompts(model, prompts, images)
    written = model.model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, use_cache=True)
    answers = written[:, inputs["input_ids"].shape[1] :]
    return [str(text) for text in model.processor.batch_decode(answers, skip_special_tokens=True)]


def encode_prompts(model: QwenVL, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
    """The processor's tensors of a batch of prompts, padded on the left, where they are generated from."""
    texts = [chat_text(model, prompt, images=len(mine)) for prompt, mine in zip(prompts, images, strict=True)]
    every = [image for mine in images for image in mine]
    inputs = model.processor(text=texts, images=every or None, padding=True, padding_side="left", return_tensors="pt")
    return inputs.to(model.device)


def answers(model: QwenVL, samples: Sequence[Sample], *, batch: int = 32, progress: bool = False) -> list[str]:
    """The answer to each sample."""
    order = sorted(range(len(samples)), key=lambda index: len(prompt_text(samples[index])))
    found: dict[int, str] = {}
    chunks = [order[start : start + batch] for start in range(0, len(order), batch)]
    for chunk in tqdm(chunks, desc="generate", unit="batch", disable=not progress):
        mine = [samples[index] for index in chunk]
        pictures = [[decode_image(sample.image)] if sample.image else [] for sample in mine]
        found |= dict(zip(chunk, generate(model, list(map(prompt_text, mine)), pictures, new_tokens=_NEW_TOKENS)))
    return [found[index] for index in range(len(samples))]
