"""One export as a value: what was asked for, and how far it is."""

import hashlib
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["queued", "running", "complete", "failed", "evicted"]
UNFINISHED = ("queued", "running")


@dataclass(frozen=True)
class Asked:
    """What was asked for: all that a checkpoint's contents depend on, and how the asker put it.

    Attributes:
        model: name of the model on offer.
        fingerprints: of its weights, statistics and predictor.
        budget: neurons that stay.
        format, recovery: of the checkpoint.
        target: as first asked, such as `{"ratio": 0.3}`; two targets of one budget are the same checkpoint.
        bits: of the weights.
        uniform: whether all layers keep alike; else they keep what the predictor says.
        kept: where attention is pruned, too, a hash of all widths, which no number of neurons tells.
    """

    model: str
    fingerprints: Mapping[str, str]
    budget: int
    format: str
    recovery: str
    target: Mapping[str, float | int | str]
    uniform: bool = False
    bits: int = 16
    kept: str | None = None

    @property
    def id(self) -> str:
        """32 hex digits: the hash of everything but the wording of the target."""
        content: list[Any] = [self.model, dict(self.fingerprints), self.budget, self.format, self.recovery]
        if self.uniform:
            content.append("uniform")
        if self.bits != 16:  # So that what was made before there were others keeps its id.
            content.append(f"{self.bits} bits")
        if self.kept is not None:
            content.append(self.kept)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Job:
    """One checkpoint, from being asked for to being thrown away.

    Attributes:
        asked: what for.
        allocation: the answer to the target (`lop.checkpoint.footprint.Footprint.describe`).
        reserved: bytes that it is expected to take.
        order: a new one each time it is queued; tells a worker that its job was withdrawn meanwhile.
        number: the clock's reading when it was asked for: jobs are done, and listed, in this order.
        created, started, finished: seconds since 1970, for people.
        attempts: exports begun.
        bytes: taken on disk.
        files: by name, their bytes and SHA-256.
    """

    asked: Asked
    allocation: Mapping[str, Any]
    reserved: int
    state: State = "queued"
    order: str = field(default_factory=lambda: uuid.uuid4().hex)
    number: int = 0
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    attempts: int = 0
    error: str | None = None
    bytes: int | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.asked.id

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Job":
        """The inverse of `as_dict`."""
        return cls(**{**data, "asked": Asked(**data["asked"])})


class QueueFullError(Exception):
    """As many exports wait as may."""


class TooLargeError(Exception):
    """The checkpoint alone is larger than the quota."""


class WithdrawnError(Exception):
    """The job was deleted, or queued anew, while it ran."""
