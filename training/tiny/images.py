"""The images: easy-VQA's shapes, Fashion-MNIST's products, and flags drawn with chance variations."""

import gzip
import json
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import easy_vqa
import numpy as np
from PIL import Image, ImageEnhance

from training.tiny.facts import FLAGS

SIDE = 64
FASHION = Path("/usr/share/datasets/fashion-mnist")
# Class 6, 'Shirt', is left out: people tell it from tops, pullovers and coats no better than four times in five.
PRODUCTS = {
    0: "top",
    1: "trousers",
    2: "pullover",
    3: "dress",
    4: "coat",
    5: "sandal",
    7: "sneaker",
    8: "bag",
    9: "boot",
}


@dataclass(frozen=True)
class Picture:
    """An encoded image with what is to be seen in it; `labels` maps attribute to word."""

    image: bytes
    image_id: str
    source: str
    labels: tuple[tuple[str, str], ...]

    def __getitem__(self, attribute: str) -> str:
        return dict(self.labels)[attribute]


@cache
def shapes(split: str) -> tuple[Picture, ...]:
    """easy-VQA's images of a split (`train` or `test`), with colour and shape read from its own questions."""
    folder = Path(easy_vqa.__file__).parent / "data" / split
    colours: dict[int, str] = {}
    kinds: dict[int, str] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text()):
        if question.startswith(("what color", "what is the color")):
            colours[image] = answer
        elif answer in ("circle", "rectangle", "triangle"):
            kinds[image] = answer
        elif answer == "yes" and " not " not in question and " no " not in question:
            for kind in ("circle", "rectangle", "triangle"):
                if kind in question:
                    kinds[image] = kind
    return tuple(
        Picture(
            (folder / "images" / f"{image}.png").read_bytes(),
            f"easy-vqa/{split}/{image}",
            "easy-vqa",
            (("colour", colours[image]), ("shape", kinds[image])),
        )
        for image in sorted(colours.keys() & kinds.keys())
    )


@cache
def products(split: str) -> tuple[Picture, ...]:
    """Fashion-MNIST's photographs of a split (`train` or `test`), as 28×28 PNG."""
    prefix = "train" if split == "train" else "t10k"
    with gzip.open(FASHION / f"{prefix}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(FASHION / f"{prefix}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return tuple(
        Picture(
            _png(pixels[i]), f"fashion-mnist/{split}/{i}", "fashion-mnist", (("product", PRODUCTS[int(labels[i])]),)
        )
        for i in range(len(labels))
        if int(labels[i]) in PRODUCTS
    )


def draw_flag(code: str, seed: int) -> bytes:
    """A flag as JPEG, turned, cropped, blurred by scaling, recoloured and noisy by chance."""
    random = np.random.default_rng([seed, *code.encode()])
    image = _flag(code).rotate(float(random.uniform(-10, 10)), Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
    width, height = image.size
    left, right = random.uniform(0, 0.1, 2) * width
    top, bottom = random.uniform(0, 0.1, 2) * height
    image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, width - right, height - bottom))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(float(random.uniform(0.75, 1.25)))
    noise = random.normal(0, random.uniform(0, 8), (SIDE, SIDE, 3))
    pixels = np.clip(np.asarray(image, dtype=np.float64) + noise, 0, 255).astype(np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def decode(image: bytes) -> np.ndarray:
    """[64, 64, 3] uint8, as the processor sees it."""
    picture = Image.open(BytesIO(image)).convert("RGB")
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(picture)


@cache
def _flag(code: str) -> Image.Image:
    return Image.open(FLAGS / f"{code}.png").convert("RGB").resize((160, 120), Image.Resampling.LANCZOS)


def _png(pixels: np.ndarray) -> bytes:
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return stream.getvalue()
