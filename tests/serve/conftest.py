"""The service without Ray: the same API, guard and worker, on a socket of this process."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from lop.run.prediction import predictor_for
from serve.api import build_api
from serve.app import open_store
from serve.catalogue import ServedModel, load_catalogue, open_run
from serve.guard import Guard, Limits
from serve.job import Job
from serve.jobs import JobStore
from serve.keys import Keys
from serve.pruning import Worker
from serve.settings import ModelSettings, ServiceSettings


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Service:
    port: int
    settings: ServiceSettings
    store: JobStore
    finished: list[Job]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"Content-Type": "application/json"} if body is not None else {}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, sent | (headers or {}))
        answer = connection.getresponse()
        found = Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        connection.close()
        return found

    def make(self, target: Any, **changes: Any) -> Answer:
        """Without recovery: it is for one thread of a process, and here all are in one."""
        return self.ask("POST", "/v1/checkpoints", {"model": "tiny", "target": target, "recovery": "none"} | changes)

    def finish(self, id: str) -> Any:
        """Follows the checkpoint's events to their end; the last state."""
        events = self.ask("GET", f"/v1/checkpoints/{id}/events").body.decode().strip().split("\n\n")
        return json.loads(events[-1].partition("data: ")[2])


Start = Callable[..., Service]


@contextmanager
def serving(
    storage: Path,
    models: dict[str, ServedModel],
    *,
    keys: Sequence[str] = (),
    workers: int = 1,
    pruner: bool = True,
    offered: dict[str, ModelSettings] | None = None,
    **changes: Any,
) -> Iterator[Service]:
    if offered is not None:
        changes["models"] = offered
    settings = ServiceSettings(storage=storage, **{"rate": 1e6, "burst": 10**6, **changes})
    store = open_store(settings)
    runs = {name: open_run(entry) for name, entry in settings.models.items()}
    predictors = {name: predictor_for(run, run.config) for name, run in runs.items()}

    async def predict(model: str, budget: int) -> tuple[int, ...]:
        return predictors[model].allocate(budget).widths

    async def pruner_lives() -> None:
        assert pruner

    api = build_api(models, store, predict, pruner_lives, streams=settings.streams, needs_key=bool(keys))
    limits = Limits(settings.rate, settings.burst, settings.body_limit, settings.body_seconds)
    finished: list[Job] = []
    crew = [
        Worker(store, runs, time_limit=settings.time_limit, on_finish=lambda job, seconds: finished.append(job))
        for _ in range(workers)
    ]
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Guard(api, Keys(keys), limits), lifespan="off", log_level="warning"))
    threads = [threading.Thread(target=worker.run) for worker in crew]
    threads.append(threading.Thread(target=lambda: asyncio.run(server.serve([listener]))))
    for thread in threads:
        thread.start()
    try:
        yield Service(listener.getsockname()[1], settings, store, finished)
    finally:
        for worker in crew:
            worker.stop()
        server.should_exit = server.force_exit = True
        for thread in threads:
            thread.join(timeout=30)


@pytest.fixture(scope="session")
def models() -> dict[str, ServedModel]:
    return load_catalogue(ServiceSettings())


@pytest.fixture
def start(tmp_path: Path, models: dict[str, ServedModel]) -> Iterator[Start]:
    """Starts a service with other settings; on the storage of the test, unless told otherwise."""
    with ExitStack() as stack:
        yield lambda **changes: stack.enter_context(
            serving(changes.pop("storage", tmp_path / "s"), changes.pop("models", models), **changes)
        )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, models: dict[str, ServedModel]) -> Iterator[Service]:
    """A service for tests that leave it as they find it."""
    with serving(tmp_path_factory.mktemp("service"), models) as started:
        yield started
