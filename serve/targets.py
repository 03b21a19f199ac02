"""What a request may name as its target: exactly one of five."""

from collections.abc import Callable, Collection, Mapping
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from lop.errors import LopError
from lop.space.latency import PHASES, Profile
from lop.space.memory import Load
from lop.space.size import Target
from serve.settings import Name

_LARGEST = 2**63 - 1


class Request(BaseModel):
    """What is sent to the service: no other fields than these, and no values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def offered(names: Collection[str]) -> Callable[[str], str]:
    """A validator of strings: passes these names alone."""

    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"is not one of {', '.join(names)}")
        return name

    return check


class RatioTarget(Request):
    """Share of the FFN neurons to remove; where attention is pruned, too, of the parameters of both."""

    ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, examples=[0.3])]

    def target(self, profiles: Mapping[str, Profile]) -> Target:
        return Target(ratio=self.ratio)


class ParametersTarget(Request):
    """Parameters of the whole checkpoint, at most."""

    parameters: Annotated[int, Field(ge=1, le=_LARGEST, examples=[2_500_000])]

    def target(self, profiles: Mapping[str, Profile]) -> Target:
        return Target(parameters=self.parameters)


class BytesTarget(Request):
    """Bytes of all of the checkpoint's tensors, at most."""

    bytes: Annotated[int, Field(ge=1, le=_LARGEST, examples=[5_000_000])]

    def target(self, profiles: Mapping[str, Profile]) -> Target:
        return Target(bytes=self.bytes)


_Count = Annotated[int, Field(ge=1, le=2**32)]


class MemoryTarget(Request):
    """Bytes that are held while the model answers, at most: weights, KV cache, activations and the vision tower's."""

    memory: Annotated[int, Field(ge=1, le=_LARGEST, examples=[24 * 2**30])]
    context: Annotated[_Count, Field(description="tokens of one sequence, images and answer included")]
    images: Annotated[int, Field(ge=0, le=2**32, description="in each sequence")] = 0
    batch: Annotated[_Count, Field(description="sequences at once")] = 1
    pixels: Annotated[_Count, Field(description="of each image, before the processor scales it")] = 2**20

    def target(self, profiles: Mapping[str, Profile]) -> Target:
        return Target(memory=self.memory, load=Load(self.context, self.images, self.batch, self.pixels))


class LatencyTarget(Request):
    """Seconds a token, at most, on a device that the service has a profile of."""

    latency: Annotated[float, Field(gt=0, allow_inf_nan=False, examples=[0.04])]
    device: Annotated[Name, Field(description="one of the model's `devices`")]
    phase: Annotated[str, AfterValidator(offered(PHASES)), Field(json_schema_extra={"enum": list(PHASES)})] = PHASES[0]

    def target(self, profiles: Mapping[str, Profile]) -> Target:
        """Raises LopError: there is no such device."""
        if self.device not in profiles:
            there = ", ".join(profiles) or "none"
            raise LopError(f"the service has no profile of device {self.device!r} for this model, it has: {there}")
        return Target(latency=self.latency, profile=profiles[self.device], phase=self.phase)


_KINDS = ("ratio", "parameters", "bytes", "memory", "latency")


def _kind(target: object) -> str | None:
    """Which target a request means: by the only key that names one."""
    keys = target.keys() if isinstance(target, dict) else getattr(type(target), "model_fields", {})
    kinds = [kind for kind in _KINDS if kind in keys]
    return kinds[0] if len(kinds) == 1 else None


AnyTarget = Annotated[
    Annotated[RatioTarget, Tag("ratio")]
    | Annotated[ParametersTarget, Tag("parameters")]
    | Annotated[BytesTarget, Tag("bytes")]
    | Annotated[MemoryTarget, Tag("memory")]
    | Annotated[LatencyTarget, Tag("latency")],
    Discriminator(
        _kind,
        custom_error_type="target",
        custom_error_message=f"name exactly one target: {', '.join(_KINDS[:-1])} or {_KINDS[-1]}",
    ),
]
