"""How much of the samples' images is looked at, and at a time; without torch, as every config has it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]


class ImageSettings(BaseModel):
    """How images are read.

    `batch_patches` is the most patches that a step of the vision tower sees at once; it bounds memory and changes
    results by rounding alone. `max_pixels` is the most pixels that are left of a photograph; None leaves it to the
    checkpoint's processor (Qwen2.5-VL's: 12,845,056, of which each 784 are a token).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    batch_patches: Positive = 8192
    max_pixels: Positive | None = None
