"""What an operator sets: the application's arguments in `config.yaml`, or `lop serve`'s options."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lop.run.config import find_config
from lop.storage.places import check_lasting

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Settings):
    """One model that the operator offers.

    Attributes:
        run: the folder of its run, with `config.yaml`, statistics and predictor; without one, what ships is used.
        config: the name or path of its settings; by default the run's own.
        profiles: by the name that requests use, what `lop profile` measured of the model on a device.
    """

    run: Path | None = None
    config: str | None = None
    profiles: dict[Name, Path] = {}


class ServiceSettings(_Settings):
    """All settings; each has a default, so that `serve run serve.app:app` serves the embedded model.

    Attributes:
        storage: the folder for checkpoints and the state of exports; on a cluster one that all nodes share, with
            locks and atomic renames (a local disk, NFS 4).
        models: by the name that requests use. Nothing else is ever opened for a request.
        keys_file: API keys, one a line, as well as those in `LOP_API_KEYS`; without any key only loopback is served.
        quota: bytes that checkpoints may take; the least recently used make room.
        queue: unfinished exports, beyond which new ones are refused.
        time_limit: seconds that one export may take.
        attempts: how often an export is begun before it counts as failed; a killed replica costs one.
        rate, burst: requests a second, and at once, of one API key or address, for each ingress replica.
        body_limit, body_seconds: bytes of a request's body, and seconds for all of it to arrive.
        streams: event streams that one ingress replica keeps open.
        answers: allocations that one ingress replica remembers. A model has no more of them than budgets, such as 3,900
            for the 7B, and each is a pure function of its budget; 0 asks the predictor every time.
    """

    storage: Path = Path("runs/service")
    models: dict[Name, ModelSettings] = Field(default={"tiny": ModelSettings(config="tiny")}, min_length=1)
    keys_file: Path | None = None
    quota: Annotated[int, Field(ge=1)] = 100 * 2**30
    queue: Annotated[int, Field(ge=1)] = 32
    time_limit: Annotated[float, Field(gt=0)] = 3600
    attempts: Annotated[int, Field(ge=1)] = 5
    rate: Annotated[float, Field(gt=0)] = 100
    burst: Annotated[int, Field(ge=1)] = 200
    body_limit: Annotated[int, Field(ge=1)] = 64 * 1024
    body_seconds: Annotated[float, Field(gt=0)] = 10
    streams: Annotated[int, Field(ge=1)] = 64
    answers: Annotated[int, Field(ge=0)] = 2**14

    def resolved(self) -> "ServiceSettings":
        """The same with absolute paths: replicas may have another working directory.

        Raises:
            LopError: the storage would be lost with what a Ray job, or an application's deployment, brought along.
        """
        check_lasting("storage", self.storage)
        models = {
            name: ModelSettings(
                run=entry.run and entry.run.expanduser().resolve(),
                # The name of one that comes along stays: each machine has its own.
                config=str(Path(entry.config).resolve()) if entry.config and _is_file(entry.config) else entry.config,
                profiles={device: path.expanduser().resolve() for device, path in entry.profiles.items()},
            )
            for name, entry in self.models.items()
        }
        keys = self.keys_file and self.keys_file.expanduser().resolve()
        storage = self.storage.expanduser().resolve()
        return self.model_copy(update={"storage": storage, "keys_file": keys, "models": models})


def _is_file(config: str) -> bool:
    return find_config(config) == Path(config) and Path(config).is_file()
