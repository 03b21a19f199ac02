"""What requests and answers look like; the OpenAPI document is made of these."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from serve.exporting import FORMATS, RECOVERIES
from serve.job import State
from serve.settings import Name
from serve.targets import AnyTarget, Request, offered

_EXAMPLE: JsonDict = {"model": "tiny", "target": {"ratio": 0.3}}
# Answers about a model of four layers, which is small enough to be read.
_EXPECTED: JsonDict = {"value": 0.97, "low": 0.964, "high": 0.976, "recovery": "refit"}
_ALLOCATION: JsonDict = {
    "model": "tiny",
    "ratio": 0.3125,
    "ratios": [0.0, 0.25, 0.5, 0.5],
    "widths": [128, 96, 64, 64],
    "groups": None,
    "kept_neurons": 352,
    "parameters": 2_033_000,
    "bytes": 4_066_000,
    "bits": 16,
    "expected_accuracy": _EXPECTED,
}
_MODEL: JsonDict = {
    "name": "tiny",
    "layers": 4,
    "neurons": 128,
    "granularity": 8,
    "groups": None,
    "parameters": 2_061_800,
    "bytes": 4_123_600,
    "targets": {
        "ratio": {"least": 0.0, "largest": 0.9375},
        "parameters": {"least": 1_975_400, "largest": 2_061_800},
        "bytes": {"least": 3_950_800, "largest": 4_123_600},
    },
    "formats": [*FORMATS],
    "recoveries": [*RECOVERIES],
    "recovery": "refit",
    "bits": [16, 8, 4],
    "quantised": [{"bits": 4, "bytes": {"least": 1_904_300, "largest": 1_962_500}}],
    "devices": [],
    "accuracy": [
        {
            "source": "the predictor's allocations on the test samples",
            "recovery": "refit",
            "samples": 3600,
            "points": [
                {"ratio": 0.0, "value": 0.98, "low": 0.975, "high": 0.985},
                {"ratio": 0.5, "value": 0.964, "low": 0.957, "high": 0.971},
            ],
        }
    ],
}
_CHECKPOINT: JsonDict = {
    "id": "5f0c6b1e2d3a49788c9d0e1f2a3b4c5d",
    "state": "running",
    "model": "tiny",
    "target": {"ratio": 0.3},
    "format": "hf",
    "recovery": "refit",
    "bits": 16,
    "allocation": _ALLOCATION,
    "progress": {"step": "export", "done": 1_048_576, "total": 4_066_000},
    "error": None,
    "bytes": None,
    "files": {},
    "path": None,
    "url": "/v1/checkpoints/5f0c6b1e2d3a49788c9d0e1f2a3b4c5d",
    "created": 1_795_538_436.2,
    "started": 1_795_538_436.4,
    "finished": None,
}
Probability = Annotated[float, Field(ge=0, le=1)]


def _examples(example: JsonDict) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


_Recovery = Annotated[
    Annotated[str, AfterValidator(offered(RECOVERIES)), Field(json_schema_extra={"enum": list(RECOVERIES)})] | None,
    Field(description="what makes up for the pruned neurons; by default the run's `recovery`"),
]


class AllocationRequest(Request):
    """What `POST /v1/allocations` takes; what a checkpoint weighs depends on its format and recovery, too."""

    model_config = _examples(_EXAMPLE)
    model: Name
    target: AnyTarget
    format: Annotated[str, AfterValidator(offered(FORMATS)), Field(json_schema_extra={"enum": list(FORMATS)})] = next(
        iter(FORMATS)
    )
    recovery: _Recovery = None
    bits: Annotated[Literal[16, 8, 4], Field(description="of the weights; of `bits` of the model")] = 16


class CheckpointRequest(AllocationRequest):
    """What `POST /v1/checkpoints` takes."""

    model_config = _examples({**_EXAMPLE, "format": next(iter(FORMATS))})


class Accuracy(_Answer):
    """An accuracy with its 95% interval."""

    value: Probability
    low: Probability
    high: Probability


class MeasuredAccuracy(Accuracy):
    """An accuracy that was measured at a pruning ratio."""

    ratio: Probability


class ExpectedAccuracy(Accuracy):
    """Interpolated between an accuracy curve's points."""

    recovery: Annotated[str, Field(description="what was measured: `none` where the one asked for was not")]


class AccuracyCurve(_Answer):
    """The run's measured results with one recovery; expected accuracies are interpolated between them."""

    source: str
    recovery: str
    samples: int
    points: list[MeasuredAccuracy]


class Range(_Answer):
    """The least and the largest target."""

    least: float
    largest: float


class CountRange(_Answer):
    """The least and the largest target."""

    least: int
    largest: int


class Ranges(_Answer):
    """What can be asked for with the default recovery, both ends included; `bias` adds what it holds."""

    ratio: Range
    parameters: CountRange
    bytes: CountRange


class Device(_Answer):
    """A device that the model was measured on, and the seconds a token that can be asked for."""

    name: str
    description: str
    decode: Range
    prefill: Range


class Quantised(_Answer):
    """The sizes that can be asked for with fewer bits."""

    bits: int
    bytes: CountRange


class Model(_Answer):
    """A model on offer."""

    name: str
    layers: int
    neurons: Annotated[int, Field(description="FFN neurons of each layer")]
    granularity: Annotated[int, Field(description="widths are multiples of this")]
    groups: Annotated[int | None, Field(description="of attention heads of each layer; null where none are pruned")]
    parameters: Annotated[int, Field(description="of the dense checkpoint")]
    bytes: Annotated[int, Field(description="of the dense checkpoint's tensors")]
    targets: Annotated[Ranges, Field(description="with 16 bits")]
    formats: list[str]
    recoveries: list[str]
    recovery: Annotated[str, Field(description="the default")]
    bits: Annotated[list[int], Field(description="that weights can have")]
    quantised: Annotated[list[Quantised], Field(description="sizes with each of `bits` below 16")]
    devices: Annotated[list[Device], Field(description="that a latency can be asked for")]
    accuracy: Annotated[list[AccuracyCurve], Field(description="empty where nothing was measured")]


class Models(_Answer):
    """What `GET /v1/models` answers."""

    model_config = _examples({"models": [_MODEL]})
    models: list[Model]


class Allocation(_Answer):
    """How much of each layer stays, and what that comes to."""

    model_config = _examples(_ALLOCATION)
    model: str
    ratio: Annotated[float, Field(description="share of what can be pruned, the nearest that the target allows")]
    ratios: Annotated[list[float], Field(description="pruning ratio of each layer's FFN, first to last")]
    widths: Annotated[list[int], Field(description="FFN neurons that each layer keeps")]
    groups: Annotated[list[int] | None, Field(description="groups of attention heads that it keeps, if any may go")] = (
        None
    )
    kept_neurons: int
    parameters: Annotated[int, Field(description="of the whole checkpoint")]
    bytes: Annotated[int, Field(description="of the checkpoint's tensors, zeros of padding included")]
    bits: Annotated[int, Field(description="of the weights")] = 16
    memory: Annotated[int | None, Field(description="bytes, predicted, where memory was asked for")] = None
    latency: Annotated[float | None, Field(description="seconds a token, predicted, where it was asked for")] = None
    expected_accuracy: Annotated[ExpectedAccuracy | None, Field(description="null where nothing was measured")]


class Progress(_Answer):
    """How far an export is."""

    step: Literal["recover", "quantise", "export", "check"]
    done: Annotated[int, Field(description="layers recovered, matrices quantised, bytes written, or found and checked")]
    total: int


class File(_Answer):
    """One file of a checkpoint."""

    bytes: int
    sha256: str
    url: str


class Checkpoint(_Answer):
    """A checkpoint and how it is coming along."""

    model_config = _examples(_CHECKPOINT)
    id: Annotated[str, Field(description="hash of what was asked for")]
    state: State
    model: str
    target: dict[str, float | int | str]
    format: str
    recovery: str
    bits: int
    allocation: Allocation
    progress: Progress | None
    error: Annotated[str | None, Field(description="why it failed")]
    bytes: Annotated[int | None, Field(description="taken on disk")]
    files: dict[str, File]
    path: Annotated[str | None, Field(description="the folder in the service's storage, once complete")]
    url: str
    created: Annotated[float, Field(description="seconds since 1970, as the others")]
    started: float | None
    finished: float | None


class Checkpoints(_Answer):
    """One page, the newest first."""

    model_config = _examples({"checkpoints": [_CHECKPOINT], "next": None})
    checkpoints: list[Checkpoint]
    next: Annotated[str | None, Field(description="`after` of the next page; null on the last")]


class Status(_Answer):
    """All is well."""

    model_config = _examples({"status": "ready"})
    status: str


class Problem(_Answer):
    """An error, as RFC 9457 has it."""

    model_config = _examples(
        {
            "type": "about:blank",
            "title": "Unprocessable Content",
            "status": 422,
            "detail": "target 0.99 is outside [0, 0.9333]",
            "request_id": "7b1c1a5e8f7e4a0c9d1f3f0e2c4b6a58",
        }
    )
    type: str
    title: str
    status: int
    detail: str
    request_id: str


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for errors that a route may answer."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _REASONS[status], "content": content} for status in statuses}


_REASONS = {
    400: "The request cannot be read",
    401: "No API key, or a wrong one",
    403: "No API keys are configured, and the request comes from another machine",
    404: "There is no such thing",
    408: "The body took too long to arrive",
    409: "Not in this state",
    413: "The body is too large",
    416: "The file has no such range",
    422: "A value is wrong; `detail` names it",
    429: "Too many requests, streams or waiting exports; `Retry-After` says when to come back",
    503: "Not ready",
}
