"""How far llama.cpp is from transformers on a sample."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from lop.model.adapter import QwenVL
from lop.model.encoding import chat_text
from lop.model.samples import Sample, decode_image, prompt_text
from tests.llama import Llama


def says(network: QwenVL, sample: Sample) -> tuple[dict[str, Any], np.ndarray]:
    """What a sample is in tokens, places and embeddings, and transformers' logits [T, V] on it."""
    processor, model = network.processor, network.model
    if sample.is_prose:
        inputs = processor.tokenizer(sample.question + sample.answer, return_tensors="pt")
    else:
        text = chat_text(network, prompt_text(sample), images=int(bool(sample.image)))
        images = {"images": [decode_image(sample.image)]} if sample.image else {}
        inputs = processor(text=[text], return_tensors="pt", **images)
    ids = inputs["input_ids"]
    with torch.inference_mode():
        logits = model(**inputs).logits[0].numpy()
        seen = None
        if sample.image:
            (seen,) = network.family.image_features(model, inputs["pixel_values"], inputs["image_grid_thw"])
    types = inputs.get("mm_token_type_ids", torch.zeros_like(ids))
    places = network.family.positions(model, ids[0], types[0], inputs.get("image_grid_thw"))
    read = {
        "ids": ids[0].numpy(),
        "places": places.numpy(),
        "shown": (ids[0] == model.config.image_token_id).numpy(),
        "seen": None if seen is None else seen.numpy(),
    }
    return read, logits


def divergence(llama: Llama, read: dict[str, Any], expected: np.ndarray) -> dict[str, Any]:
    """KL of llama.cpp's distributions from the expected ones, at each of a sample's tokens that is text."""
    llama.forget()
    parts = []
    for start, stop, shown in stretches(read["shown"]):
        if shown:
            llama.see(read["seen"], read["places"][:, start:stop])
        else:
            logits = llama.read(read["ids"][start:stop].tolist(), int(read["places"][0, start]))
            parts.append((expected[start:stop], logits))
    ours, theirs = (torch.from_numpy(np.concatenate(side)).double().log_softmax(-1) for side in zip(*parts))
    kl = (ours.exp() * (ours - theirs)).sum(-1).clamp(min=0).numpy()
    return {"kl": kl, "mean": float(kl.mean()), "same": bool(ours[-1].argmax() == theirs[-1].argmax())}


def stretches(shown: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """Where text and images begin and end."""
    edges = [0, *(np.flatnonzero(np.diff(shown.astype(int))) + 1).tolist(), len(shown)]
    for start, stop in pairwise(edges):
        yield start, stop, bool(shown[start])
