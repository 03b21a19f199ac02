"""Images through processor and vision tower, in memory that does not grow with the size of a photograph."""

from collections.abc import Sequence
from contextlib import nullcontext

from PIL import Image
from torch import Tensor

from lop.errors import LopError
from lop.model.adapter import QwenVL
from lop.model.image_settings import ImageSettings
from lop.model.samples import image_size


def check_pixels(model: QwenVL, max_pixels: int | None) -> None:
    """Checks that the processor can make images as small as that.

    Raises:
        LopError: it makes none so small.
    """
    least = model.family.least_pixels(model.processor)
    if max_pixels is not None and max_pixels < least:
        raise LopError(f"images.max_pixels {max_pixels} is too few: the processor makes at least {least} of any image")


def patches_of(model: QwenVL, image: bytes, max_pixels: int | None) -> int:
    """Into how many patches the processor cuts an image, told from its size alone."""
    width, height = image_size(image)
    return model.family.patches(model.processor, height, width, max_pixels)


def image_tower(model: QwenVL, images: Sequence[Image.Image], settings: ImageSettings) -> list[tuple[Tensor, Tensor]]:
    """For each image its grid [1, 3], on the model's device, and its embeddings [tokens, H], in host memory.

    All go through the tower together. Where that is more than `settings.batch_patches` (a single photograph), no step
    of the tower sees more of them at once, but for queries, keys and values where each patch looks at all others.
    """
    pixels, grids = model.family.pixels(model.processor, images, settings.max_pixels)
    pixels, most = pixels.to(model.device, model.tower.dtype), settings.batch_patches
    with model.family.sliced(model.tower, most) if grids.prod(1).sum() > most else nullcontext():
        features = model.image_features(pixels, grids.to(model.device))
    return [(grid[None].to(model.device), found.cpu()) for grid, found in zip(grids, features)]
