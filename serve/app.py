"""The Ray Serve application: `serve run serve.app:app`, `serve deploy` with `config.yaml`, or `lop serve`.

Three deployments. `api` answers HTTP; it gathers the allocations asked for at one time into one call to `predictor`,
which scales by itself; `pruner` exports what `api` has written down in storage.
"""

import threading
from typing import Any, cast

import torch
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Gauge, Histogram
from starlette.types import ASGIApp

from lop.errors import LopError
from lop.run.prediction import predictor_for, predictor_identity
from lop.storage.destination import check_writable
from lop.storage.location import Location
from serve.api import build_api
from serve.batching import Batcher
from serve.catalogue import ServedModel, load_catalogue, open_run
from serve.guard import Guard, Limits, is_loopback
from serve.job import Job
from serve.jobs import FOLDERS, JobStore
from serve.keys import VARIABLE, load_keys
from serve.pruning import Worker
from serve.settings import ServiceSettings

_LOGGING = {"encoding": "JSON", "enable_access_log": False}
_LARGEST_BATCH = 64
_BATCH_SECONDS = 0.010


@serve.deployment(
    name="predictor",
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 2},
    max_ongoing_requests=8,
    max_queued_requests=1000,
    ray_actor_options={"num_cpus": 0.25},
    logging_config=_LOGGING,
)
class PredictorDeployment:
    """Holds each model's predictor, which is small; the model itself is not needed."""

    def __init__(self, settings: ServiceSettings, models: dict[str, ServedModel]) -> None:
        self._predictors = {}
        for name, entry in settings.models.items():
            run = open_run(entry)
            if predictor_identity(run) != models[name].fingerprints["predictor"]:
                raise LopError(f"{run.folder} has not the predictor that was deployed: deploy again")
            # With the widths that the run's config allows, as the catalogue and `lop prune` have it.
            self._predictors[name] = predictor_for(run, run.config)

    async def allocate(self, batch: list[tuple[str, int]]) -> list[tuple[int, ...]]:
        """For each model and number of neurons to keep, the widths.

        Computed one by one: the arithmetic of a batched network differs in the last bits, and with it now and then a
        width, from what `lop prune` finds. Equal questions are answered once.
        """
        found = {asked: self._predictors[asked[0]].allocate(asked[1]).widths for asked in dict.fromkeys(batch)}
        return [found[asked] for asked in batch]


@serve.deployment(
    name="pruner",
    num_replicas=1,
    ray_actor_options={"num_cpus": 0.5},
    health_check_period_s=2,  # How soon a replica that died is replaced.
    graceful_shutdown_timeout_s=20,
    logging_config=_LOGGING,
)
class PrunerDeployment:
    """Exports on a thread of its own, so that an export never keeps the replica from answering health checks.

    One at a time: recovery builds models without weights, which changes how all threads of a process build theirs.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        torch.set_num_threads(1)
        self._exports = Counter("lop_exports", "Exports that ended.", tag_keys=("model", "state"))
        self._seconds = Histogram("lop_export_seconds", "Of one export.", boundaries=[1, 3, 10, 30, 100, 300, 1000])
        runs = {name: open_run(entry) for name, entry in settings.models.items()}
        store = open_store(settings)
        self._worker = Worker(store, runs, time_limit=settings.time_limit, on_finish=self._count)
        self._thread = threading.Thread(target=self._worker.run, name="exports", daemon=True)
        self._thread.start()

    def _count(self, job: Job, seconds: float) -> None:
        self._exports.inc(tags={"model": job.asked.model, "state": job.state})
        self._seconds.observe(seconds)

    def ready(self) -> None:
        """Answers: the replica lives."""

    def check_health(self) -> None:
        """Raises, which has Serve replace the replica, when an export hangs."""
        if not self._thread.is_alive() or self._worker.is_stuck:
            raise RuntimeError("the export thread is dead or hangs")

    def __del__(self) -> None:
        if hasattr(self, "_worker"):
            self._worker.stop()
            self._thread.join(timeout=10)


@serve.deployment(
    name="api",
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 64},
    max_ongoing_requests=512,
    ray_actor_options={"num_cpus": 0.25},
    logging_config=_LOGGING,
)
@serve.ingress()
class ApiDeployment:
    """The HTTP API and the page."""

    def __init__(
        self,
        settings: ServiceSettings,
        models: dict[str, ServedModel],
        predictor: DeploymentHandle,
        pruner: DeploymentHandle,
    ) -> None:
        self._settings, self._models, self._predictor, self._pruner = settings, models, predictor, pruner
        self._keys = load_keys(settings.keys_file)
        if not self._keys:
            _check_loopback()
        self._store = open_store(settings)
        self._batcher = Batcher(self._ask_predictor, seconds=_BATCH_SECONDS, largest=_LARGEST_BATCH)
        self._answers: dict[tuple[str, int], tuple[int, ...]] = {}
        self._batches = Histogram(
            "lop_allocation_batch", "Allocations asked for at once.", boundaries=[1, 2, 4, 8, 16, 32]
        )
        self._waiting = Gauge("lop_exports_waiting", "Exports that are queued or running.")
        self._bytes = Gauge("lop_storage_bytes", "Taken by checkpoints.")

    def __serve_build_asgi_app__(self) -> ASGIApp:
        settings = self._settings
        api = build_api(
            self._models,
            self._store,
            self._predict,
            self._check_pruner,
            streams=settings.streams,
            needs_key=bool(self._keys),
        )
        limits = Limits(settings.rate, settings.burst, settings.body_limit, settings.body_seconds)
        return Guard(api, self._keys, limits)

    async def _predict(self, model: str, budget: int) -> tuple[int, ...]:
        question = (model, budget)
        if (known := self._answers.get(question)) is not None:
            return known
        answer = await self._batcher(question)
        if self._settings.answers:
            self._answers[question] = answer
            if len(self._answers) > self._settings.answers:
                self._answers.pop(next(iter(self._answers)), None)  # The oldest.
        return answer

    async def _ask_predictor(self, batch: list[tuple[str, int]]) -> list[tuple[int, ...]]:
        self._batches.observe(len(batch))
        return await self._predictor.allocate.remote(batch)

    async def _check_pruner(self) -> None:
        await self._pruner.ready.remote()

    def check_health(self) -> None:
        """Brings the gauges up to date; storage that cannot be read makes the replica unhealthy."""
        self._waiting.set(self._store.waiting())
        self._bytes.set(self._store.bytes_taken())


def app(settings: ServiceSettings) -> Application:
    """Builds the application; called by `serve run`, `serve deploy` and `lop serve`.

    Raises:
        LopError: a model cannot be served, or storage not be written.
    """
    settings = settings.resolved()
    models = load_catalogue(settings)
    load_keys(settings.keys_file)  # A wrong file is told here, not in a replica's log.
    check_writable(Location.parse(settings.storage), *(f"{name}/" for name in FOLDERS))
    open_store(settings).check()
    predictor = cast(Any, PredictorDeployment).bind(settings, models)
    pruner = cast(Any, PrunerDeployment).bind(settings)
    return cast(Any, ApiDeployment).bind(settings, models, predictor, pruner)


def open_store(settings: ServiceSettings) -> JobStore:
    """The jobs in the settings' storage."""
    return JobStore(settings.storage, quota=settings.quota, queue=settings.queue, attempts=settings.attempts)


def _check_loopback() -> None:
    """Without keys the proxies may listen on this machine's own addresses only.

    Raises:
        LopError: they listen on another one.
    """
    # Serve has no public way to ask what its proxies were told; a replica knows its client.
    from ray.serve.context import _get_global_client

    host: Any = _get_global_client().http_config.host
    if not is_loopback(host or ""):
        raise LopError(f"HTTP on {host} without API keys: set {VARIABLE} or keys_file, or listen on 127.0.0.1")
