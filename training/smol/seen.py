"""What the merger is handed for the training images, computed once: the tower is not trained."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lop.model.adapter import open_model
from lop.model.find import assets
from training.tiny import vision
from training.tiny.corpus import Corpus
from training.tiny.images import Picture

_RENDERINGS = 40
_PRODUCTS = 10_000
_TURNS = {"easy-vqa": 4, "fashion-mnist": 1, "flags": 1}
_SHIFT = 3
_CHUNK = 256


@torch.inference_mode()
def see(seed: int) -> Corpus:
    """All training images; shapes several times, turned, mirrored and shifted by chance, products mirrored and shifted.

    The corpus' tokens are [n, 4, 1024], normed: what the merger's first product takes.
    """
    random = np.random.default_rng(seed)
    tower = open_model(assets() / "model", device="cpu", dtype="float32").model.visual
    shapes, products, flags = vision.training_pools(_RENDERINGS)
    pictures: list[Picture] = []
    tokens: list[Tensor] = []
    for part in (shapes, products[:_PRODUCTS], flags):
        pixels = vision.pixels_of(part)
        for _ in range(_TURNS[part[0].source]):
            for chunk in pixels.split(_CHUNK):
                states = vision.states(tower, _varied(chunk, part[0].source, random))
                tokens.append(tower.merger.ln_q(states).reshape(len(chunk), -1, tower.merger.hidden_size).bfloat16())
            pictures += part
    return _grouped(pictures, torch.cat(tokens))


def _varied(pixels: Tensor, source: str, random: np.random.Generator) -> Tensor:
    if source == "flags":
        return pixels
    if source == "easy-vqa":
        pixels = torch.rot90(pixels, int(random.integers(4)), (2, 3))
    if random.integers(2):
        pixels = pixels.flip(3)
    return torch.roll(pixels, random.integers(-_SHIFT, _SHIFT + 1, 2).tolist(), (2, 3))


def _grouped(pictures: Sequence[Picture], tokens: Tensor) -> Corpus:
    """Images that show the same stand together."""
    order = sorted(range(len(pictures)), key=lambda index: pictures[index].labels)
    labels = [pictures[index].labels for index in order]
    starts = [i for i in range(len(labels)) if i == 0 or labels[i] != labels[i - 1]]
    return Corpus(tokens[order], np.array([*starts, len(order)]), [pictures[order[start]] for start in starts])
