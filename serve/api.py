"""The HTTP API: a FastAPI application that knows nothing of Ray.

It is given the models on offer, the jobs in storage and a function that asks the predictor; `serve.app` puts it on
Ray Serve, and tests call it as it is.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import FastAPI, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.staticfiles import NotModifiedResponse
from starlette.types import Receive, Scope, Send

import lop
from lop.checkpoint.footprint import Footprint
from lop.errors import LopError
from lop.report.intervals import Interval
from lop.space.allocation import Allocation, uniform
from serve import schemas
from serve.catalogue import Curve, ServedModel
from serve.exporting import FORMATS, RECOVERIES
from serve.guard import problem
from serve.jobs import UNFINISHED, Asked, Job, JobStore, QueueFullError, TooLargeError
from serve.schemas import problems

log = logging.getLogger("ray.serve")

# From a model's name and the neurons to keep, to the widths.
Predict = Callable[[str, int], Awaitable[tuple[int, ...]]]
Check = Callable[[], Awaitable[object]]

_ID = r"^[0-9a-f]{32}$"
_FILE = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"
_POLL_SECONDS = 0.2
_HEARTBEAT_SECONDS = 15
_STREAM_SECONDS = 3600
_RETRY_SECONDS = 10
_READY_SECONDS = 5
_COMMON = (400, 401, 403, 408, 413, 429)
Id = Annotated[str, PathParameter(pattern=_ID, examples=["0" * 32])]

DESCRIPTION = """\
Ask for a size, get a model. A **target** is a pruning ratio, a number of parameters or a number of bytes;
`POST /v1/allocations` says at once what each layer would keep, `POST /v1/checkpoints` makes the checkpoint.
Errors are problem documents (RFC 9457), and each answer carries an `X-Request-ID`."""


def build_api(
    models: Mapping[str, ServedModel], store: JobStore, predict: Predict, check_pruner: Check, *, streams: int
) -> FastAPI:
    """The application's routes.

    Args:
        models: on offer, by name.
        store: the jobs.
        predict: asks the predictor.
        check_pruner: raises if nobody exports.
        streams: event streams kept open at once.
    """
    api = FastAPI(
        title="LOP",
        version=lop.__version__,
        description=DESCRIPTION,
        docs_url=None,  # Both pages would load scripts from other sites.
        redoc_url=None,
        responses=problems(*_COMMON),
    )
    _add_errors(api)
    _add_models(api, models, predict)
    _add_checkpoints(api, models, store, predict)
    _add_files(api, store)
    _add_events(api, store, streams)
    _add_health(api, models, store, predict, check_pruner)
    _add_page(api)
    api.openapi = lambda: _openapi(api)  # type: ignore[method-assign]
    return api


def _add_models(api: FastAPI, models: Mapping[str, ServedModel], predict: Predict) -> None:
    listed = schemas.Models(models=[_model(model) for model in models.values()])

    @api.get("/v1/models", summary="Models on offer")
    async def list_models() -> schemas.Models:
        return listed

    # Answered as plain values: checking an answer made here against its own schema would cost more than making it.
    @api.post(
        "/v1/allocations",
        summary="What each layer would keep",
        response_class=JSONResponse,
        response_model=None,
        responses={200: {"model": schemas.Allocation}, **problems(404, 422)},
    )
    async def allocate(asked: schemas.AllocationRequest) -> JSONResponse:
        model = _find(models, asked.model)
        return JSONResponse(await _allocate(model, asked, predict))


def _add_checkpoints(api: FastAPI, models: Mapping[str, ServedModel], store: JobStore, predict: Predict) -> None:
    @api.post(
        "/v1/checkpoints",
        status_code=202,
        summary="Make a checkpoint",
        description="The same request again gives the same id: one that is there, or under way, is not made twice.",
        responses={
            202: {"headers": {"Location": {"schema": {"type": "string"}, "description": "where its state is"}}},
            **problems(404, 422),
        },
    )
    async def create(asked: schemas.CheckpointRequest, response: Response) -> schemas.Checkpoint:
        model = _find(models, asked.model)
        footprint = _footprint(model, asked)
        allocation = await _allocate(model, asked, predict)
        job = Job(
            Asked(
                model.name,
                model.fingerprints,
                allocation["kept_neurons"],
                footprint.format,
                footprint.recovery,
                asked.target.model_dump(),
                footprint.is_uniform(asked.target.target()),
            ),
            allocation,
            reserved=allocation["bytes"] + model.companions,
        )
        try:
            job = await run_sync(store.submit, job)
        except QueueFullError:
            headers = {"Retry-After": str(_RETRY_SECONDS)}
            raise HTTPException(429, "as many exports are waiting as may", headers) from None
        except TooLargeError:
            raise HTTPException(422, "the checkpoint would be larger than the storage's quota") from None
        response.headers["Location"] = _url(job.id)
        return _checkpoint(job, store)

    @api.get("/v1/checkpoints", summary="All checkpoints", responses=problems(422))
    def list_checkpoints(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(pattern=_ID, description="`next` of the page before")] = None,
    ) -> schemas.Checkpoints:
        jobs = store.all()
        if after is not None:
            start = next((place for place, job in enumerate(jobs, start=1) if job.id == after), None)
            if start is None:
                raise HTTPException(422, "after: there is no such checkpoint any more")
            jobs = jobs[start:]
        page = [_checkpoint(job, store) for job in jobs[:limit]]
        return schemas.Checkpoints(checkpoints=page, next=page[-1].id if len(jobs) > limit else None)

    @api.get("/v1/checkpoints/{id}", summary="A checkpoint's state", responses=problems(404, 422))
    def show(id: Id) -> schemas.Checkpoint:
        return _checkpoint(_job(store, id), store)

    @api.delete(
        "/v1/checkpoints/{id}", status_code=204, summary="Cancel or remove a checkpoint", responses=problems(404, 422)
    )
    def remove(id: Id) -> None:
        if not store.remove(id):
            raise HTTPException(404, "there is no such checkpoint")


def _add_files(api: FastAPI, store: JobStore) -> None:
    @api.head("/v1/checkpoints/{id}/files/{name}", include_in_schema=False)
    @api.get(
        "/v1/checkpoints/{id}/files/{name}",
        summary="Download a file",
        description="Goes on where a download broke off: takes `Range`, with `If-Range`; the `ETag` is the file's "
        "SHA-256. A checkpoint that is not complete has no files yet (409): wait for it, and have the client fail "
        "(`curl --fail`) rather than keep the error as if it were the file.",
        response_class=FileResponse,
        responses={
            200: {"content": {"application/octet-stream": {}}, "description": "The file"},
            206: {"content": {"application/octet-stream": {}}, "description": "A part of the file"},
            304: {"description": "The client has it already (`If-None-Match`)"},
            **problems(404, 409, 416, 422),
        },
    )
    def download(
        id: Id, name: Annotated[str, PathParameter(pattern=_FILE, examples=["model.safetensors"])]
    ) -> FileResponse:
        job = _job(store, id)
        if job.state in UNFINISHED:
            raise HTTPException(409, f"the checkpoint is {job.state}", {"Retry-After": str(_RETRY_SECONDS)})
        if job.state != "complete":
            raise HTTPException(409, f"the checkpoint is {job.state}")
        if name not in job.files:
            raise HTTPException(404, "the checkpoint has no such file")
        path = store.folder(job) / name
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise HTTPException(404, "the checkpoint has been removed") from None
        store.touch(job)
        headers = {"ETag": f'"{job.files[name]["sha256"]}"'}
        return _File(path, headers=headers, media_type="application/octet-stream", filename=name, stat_result=stat)


class _File(FileResponse):
    """Knows what the client has already, and reads `Range` as RFC 9110 has it; errors are problem documents."""

    chunk_size = 1024 * 1024

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Headers(scope=scope)
        known = [tag.strip().removeprefix("W/") for tag in asked.get("if-none-match", "").split(",")]
        if self.headers["etag"] in known or "*" in known:
            await NotModifiedResponse(self.headers)(scope, receive, send)
            return
        if scope["method"] != "GET" or not asked.get("range", "").lower().startswith("bytes="):
            # There are no ranges of other methods, and other units are to be ignored.
            scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if name != b"range"]}
        started: dict[str, Any] = {}

        async def watched(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                started.update(message)
            elif not started:
                await send(message)

        await super().__call__(scope, receive, watched)
        if started:
            size = self.stat_result.st_size if self.stat_result else 0
            detail = f"Range: the file has {size} bytes" if started["status"] == 416 else "Range cannot be read"
            headers = {"Content-Range": f"bytes */{size}"} if started["status"] == 416 else None
            request_id = scope["state"]["request_id"]
            await _problem(started["status"], detail, request_id, headers)(scope, receive, send)


def _add_events(api: FastAPI, store: JobStore, streams: int) -> None:
    slots = asyncio.Semaphore(streams)

    @api.get(
        "/v1/checkpoints/{id}/events",
        summary="Follow a checkpoint",
        description="Server-sent events: `checkpoint` with the state each time that something changes, the "
        "last of them "
        "with a final state; `removed` if it is deleted meanwhile.",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}, "description": "Events"}, **problems(404, 422)},
    )
    async def follow(id: Id) -> StreamingResponse:
        await run_sync(_job, store, id)
        if slots.locked():
            raise HTTPException(429, "too many event streams", {"Retry-After": str(_RETRY_SECONDS)})
        await slots.acquire()
        return _Events(_events(store, id), slots)


class _Events(StreamingResponse):
    """Gives its slot back however it ends."""

    def __init__(self, content: AsyncIterator[str], slots: asyncio.Semaphore) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._slots = slots

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._slots.release()


async def _events(store: JobStore, id: str) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    last, sent, end = "", loop.time(), loop.time() + _STREAM_SECONDS
    while loop.time() < end:
        job = await run_sync(store.get, id)
        if job is None:
            yield _event("removed", json.dumps({"id": id}))
            return
        text = (await run_sync(_checkpoint, job, store)).model_dump_json()
        if text != last:
            yield _event("checkpoint", text)
            last, sent = text, loop.time()
        elif loop.time() - sent > _HEARTBEAT_SECONDS:
            yield ": still here\n\n"
            sent = loop.time()
        if job.state not in UNFINISHED:
            return
        await asyncio.sleep(_POLL_SECONDS)


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


def _add_health(
    api: FastAPI, models: Mapping[str, ServedModel], store: JobStore, predict: Predict, check_pruner: Check
) -> None:
    async def checks() -> AsyncIterator[tuple[str, Awaitable[object]]]:
        for model in models.values():
            yield f"the predictor of {model.name}", predict(model.name, model.space.budget(0))
        yield "the pruner", check_pruner()
        yield "storage", run_sync(store.check)

    @api.get("/healthz", summary="Whether the process lives", tags=["health"])
    async def healthz() -> schemas.Status:
        return schemas.Status(status="ok")

    @api.get(
        "/readyz",
        summary="Whether requests can be answered",
        description="Asks the predictor for every model, the pruner for a sign of life, and storage for room.",
        responses=problems(503),
        tags=["health"],
    )
    async def readyz() -> schemas.Status:
        async for what, check in checks():
            try:
                async with asyncio.timeout(_READY_SECONDS):
                    await check
            except Exception as error:
                log.warning("not ready: %s: %s", what, error)
                raise HTTPException(503, f"not ready: {what} does not answer") from error
        return schemas.Status(status="ready")


_PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def _add_page(api: FastAPI) -> None:
    folder = Path(str(files("serve"))) / "page"
    page = {file.name: (file.read_bytes(), _PAGE_TYPES[file.suffix]) for file in folder.iterdir() if file.is_file()}

    @api.get("/", include_in_schema=False)
    async def index() -> Response:
        return _page_file("index.html")

    @api.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return _page_file(name)

    def _page_file(name: str) -> Response:
        if name not in page:
            raise HTTPException(404, "there is no such page")
        content, kind = page[name]
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # What was sent is not repeated: it may be NaN, which is no JSON, or enormous.
        wrong = [f"{'.'.join(map(_part, item['loc']))}: {item['msg']}" for item in error.errors()[:5]]
        return _problem(422, "; ".join(wrong), request.state.request_id)

    @api.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers) if error.headers else None
        return _problem(error.status_code, str(error.detail), request.state.request_id, headers)

    @api.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        # Starlette raises it again; the guard logs it.
        return _problem(500, "internal error", request.state.request_id)

    @api.exception_handler(LopError)
    async def wrong(request: Request, error: LopError) -> Response:
        return _problem(422, str(error), request.state.request_id)


def _part(part: object) -> str:
    return ascii(part)[1:-1][:40] if isinstance(part, str) else str(part)


def _problem(status: int, detail: str, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(problem(status, detail, request_id), status, headers, "application/problem+json")


def _find(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    if name not in models:
        raise HTTPException(404, f"model {name} is not offered: {', '.join(models)}")
    return models[name]


async def _allocate(model: ServedModel, asked: schemas.AllocationRequest, predict: Predict) -> dict[str, Any]:
    """The fields of `schemas.Allocation`.

    Raises:
        LopError: the target cannot be met, or the format has no place for the recovery.
    """
    footprint, target = _footprint(model, asked), asked.target.target()
    budget = footprint.budget(target, model.space)
    if footprint.is_uniform(target):
        answer = footprint.describe(uniform(model.space, budget), model.space)
        return {"model": model.name, **answer, "expected_accuracy": None}  # What was measured is the predictor's.
    answer = footprint.describe(Allocation(await predict(model.name, budget)), model.space)
    return {"model": model.name, **answer, "expected_accuracy": _expected(model, asked.recovery, answer["ratio"])}


def _footprint(model: ServedModel, asked: schemas.AllocationRequest) -> Footprint:
    return Footprint(model.size, asked.format, asked.recovery or model.recovery)


def _expected(model: ServedModel, recovery: str | None, ratio: float) -> dict[str, Any] | None:
    """The fields of `schemas.ExpectedAccuracy`."""
    curve = model.curve(recovery or model.recovery)
    accuracy = curve.at(ratio) if curve else None
    return {**_interval(accuracy), "recovery": curve.recovery} if curve and accuracy else None


def _model(model: ServedModel) -> schemas.Model:
    space, size = model.space, model.size
    footprint = Footprint(size, recovery=model.recovery)
    least, most = ([width] * space.layers for width in (space.min_width, space.neurons))
    return schemas.Model(
        name=model.name,
        layers=space.layers,
        neurons=space.neurons,
        granularity=space.granularity,
        parameters=size.parameters,
        bytes=size.bytes,
        targets=schemas.Ranges(
            ratio=schemas.Range(least=0, largest=space.max_target),
            parameters=schemas.CountRange(least=footprint.parameters(least), largest=footprint.parameters(most)),
            bytes=schemas.CountRange(least=footprint.bytes(least), largest=footprint.bytes(most)),
        ),
        formats=list(FORMATS),
        recoveries=list(RECOVERIES),
        recovery=model.recovery,
        accuracy=[_curve(curve) for curve in model.curves.values()],
    )


def _curve(curve: Curve) -> schemas.AccuracyCurve:
    points = [
        schemas.MeasuredAccuracy(ratio=max(ratio, 0), **_interval(accuracy))
        for ratio, accuracy in zip(curve.ratios, curve.accuracies)
    ]
    return schemas.AccuracyCurve(source=curve.source, recovery=curve.recovery, samples=curve.samples, points=points)


def _interval(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _job(store: JobStore, id: str) -> Job:
    job = store.get(id)
    if job is None:
        raise HTTPException(404, "there is no such checkpoint")
    return job


def _checkpoint(job: Job, store: JobStore) -> schemas.Checkpoint:
    progress = store.progress(job.id) if job.state == "running" else None
    return schemas.Checkpoint(
        id=job.id,
        state=job.state,
        model=job.asked.model,
        target=dict(job.asked.target),
        format=job.asked.format,
        recovery=job.asked.recovery,
        allocation=schemas.Allocation(**job.allocation),
        progress=schemas.Progress(**progress) if progress else None,
        error=job.error,
        bytes=job.bytes,
        files={name: schemas.File(**about, url=f"{_url(job.id)}/files/{name}") for name, about in job.files.items()},
        path=str(store.folder(job)) if job.state == "complete" else None,
        url=_url(job.id),
        created=job.created,
        started=job.started,
        finished=job.finished,
    )


def _url(id: str) -> str:
    return f"/v1/checkpoints/{id}"


def _openapi(api: FastAPI) -> dict[str, Any]:
    if api.openapi_schema is None:
        document = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
        schemes = document["components"]
        schemes["schemas"]["Problem"] = schemas.Problem.model_json_schema()
        for name, schema in schemes["schemas"].items():
            if "examples" in schema:  # FastAPI has dropped their nulls.
                schema["examples"] = getattr(schemas, name).model_json_schema()["examples"]
        schemes["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in document["paths"].items():
            for operation in methods.values():
                if path.startswith("/v1/"):
                    operation["security"] = [{"key": []}]
        api.openapi_schema = document
    return api.openapi_schema
