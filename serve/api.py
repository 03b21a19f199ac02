"""The HTTP API: a FastAPI application that knows nothing of Ray.

It is given the models on offer, the jobs in storage and a function that asks the predictor; `serve.app` puts it on
Ray Serve, and tests call it as it is.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import lop
from lop.checkpoint.footprint import Footprint
from lop.errors import LopError
from lop.report.intervals import Interval
from lop.space.allocation import Allocation, Space, dense, leanest
from lop.space.latency import Profile
from lop.storage.fingerprint import fingerprint
from serve import schemas
from serve.catalogue import Curve, ServedModel
from serve.downloads import ID, RETRY_SECONDS, Id, add_events, add_files, describe, find_job, problem_response, url_of
from serve.exporting import BITS, FORMATS, RECOVERIES
from serve.job import Asked, Job, QueueFullError, TooLargeError
from serve.jobs import JobStore
from serve.schemas import problems

log = logging.getLogger("ray.serve")

# From a model's name and the neurons to keep, to the widths.
Predict = Callable[[str, int], Awaitable[tuple[int, ...]]]
Check = Callable[[], Awaitable[object]]

_READY_SECONDS = 5
_TRIED_AT_ONCE = 16
_COMMON = (400, 401, 403, 408, 413, 429)

DESCRIPTION = """\
Ask for a size, get a model. A **target** is a pruning ratio, parameters, bytes, memory for a context, or a latency;
`POST /v1/allocations` says at once what each layer would keep, `POST /v1/checkpoints` makes the checkpoint.
Errors are problem documents (RFC 9457), and each answer carries an `X-Request-ID`."""


def build_api(
    models: Mapping[str, ServedModel],
    store: JobStore,
    predict: Predict,
    check_pruner: Check,
    *,
    streams: int,
    needs_key: bool = False,
) -> FastAPI:
    """The application's routes.

    Args:
        models: on offer, by name.
        store: the jobs.
        predict: asks the predictor.
        check_pruner: raises if nobody exports.
        streams: event streams kept open at once.
        needs_key: whether what is below `/v1/` needs an API key; goes into the document alone, the guard asks for it.
    """
    api = FastAPI(
        title="LOP",
        version=lop.__version__,
        description=DESCRIPTION,
        docs_url=None,  # Both pages would load scripts from other sites.
        redoc_url=None,
        responses=problems(*_COMMON),
        # A route's function is named as a generated client should name the call.
        generate_unique_id_function=lambda route: route.name,
    )
    _add_errors(api)
    _add_models(api, models, predict)
    _add_checkpoints(api, models, store, predict)
    add_files(api, store)
    add_events(api, store, streams)
    _add_health(api, models, store, predict, check_pruner)
    _add_page(api)
    api.openapi = lambda: _openapi(api, needs_key)  # type: ignore[method-assign]
    return api


def _add_models(api: FastAPI, models: Mapping[str, ServedModel], predict: Predict) -> None:
    listed = schemas.Models(models=[_model(model) for model in models.values()])

    @api.get("/v1/models", summary="Models on offer", tags=["models"])
    async def list_models() -> schemas.Models:
        return listed

    # Answered as plain values: checking an answer made here against its own schema would cost more than making it.
    @api.post(
        "/v1/allocations",
        summary="What each layer would keep",
        tags=["models"],
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
        tags=["checkpoints"],
        description="The same request again gives the same id: one that is there, or under way, is not made twice.",
        responses={
            202: {"headers": {"Location": {"schema": {"type": "string"}, "description": "where its state is"}}},
            **problems(404, 422),
        },
    )
    async def create_checkpoint(asked: schemas.CheckpointRequest, response: Response) -> schemas.Checkpoint:
        model = _find(models, asked.model)
        footprint = _footprint(model, asked)
        allocation = await _allocate(model, asked, predict)
        groups = allocation["groups"]
        kept = None if groups is None else fingerprint([allocation["widths"], groups])
        job = Job(
            Asked(
                model.name,
                model.fingerprints,
                allocation["kept_neurons"],
                footprint.format,
                footprint.recovery,
                asked.target.model_dump(),
                footprint.is_uniform(asked.target.target(model.profiles)),
                footprint.bits,
                kept,
            ),
            allocation,
            reserved=allocation["bytes"] + model.companions,
        )
        try:
            job = await run_sync(store.submit, job)
        except QueueFullError:
            headers = {"Retry-After": str(RETRY_SECONDS)}
            raise HTTPException(429, "as many exports are waiting as may", headers) from None
        except TooLargeError:
            raise HTTPException(422, "the checkpoint would be larger than the storage's quota") from None
        response.headers["Location"] = url_of(job.id)
        return describe(job, store)

    @api.get("/v1/checkpoints", summary="All checkpoints", tags=["checkpoints"], responses=problems(422))
    def list_checkpoints(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(pattern=ID, description="`next` of the page before")] = None,
    ) -> schemas.Checkpoints:
        jobs = store.all()
        if after is not None:
            start = next((place for place, job in enumerate(jobs, start=1) if job.id == after), None)
            if start is None:
                raise HTTPException(422, "after: there is no such checkpoint any more")
            jobs = jobs[start:]
        page = [describe(job, store) for job in jobs[:limit]]
        return schemas.Checkpoints(checkpoints=page, next=page[-1].id if len(jobs) > limit else None)

    @api.get("/v1/checkpoints/{id}", summary="A checkpoint's state", tags=["checkpoints"], responses=problems(404, 422))
    def get_checkpoint(id: Id) -> schemas.Checkpoint:
        return describe(find_job(store, id), store)

    @api.delete(
        "/v1/checkpoints/{id}",
        status_code=204,
        summary="Cancel or remove a checkpoint",
        tags=["checkpoints"],
        responses=problems(404, 422),
    )
    def delete_checkpoint(id: Id) -> None:
        if not store.remove(id):
            raise HTTPException(404, "there is no such checkpoint")


def _add_health(
    api: FastAPI, models: Mapping[str, ServedModel], store: JobStore, predict: Predict, check_pruner: Check
) -> None:
    async def checks() -> AsyncIterator[tuple[str, Awaitable[object]]]:
        for model in models.values():
            yield f"the predictor of {model.name}", predict(model.name, model.space.budget(0))
        yield "the pruner", check_pruner()
        yield "storage", run_sync(store.check)

    @api.get("/healthz", summary="Whether the process lives", tags=["health"])
    async def get_health() -> schemas.Status:
        return schemas.Status(status="ok")

    @api.get(
        "/readyz",
        summary="Whether requests can be answered",
        description="Asks the predictor for every model, the pruner for a sign of life, and storage for room.",
        responses=problems(503),
        tags=["health"],
    )
    async def get_readiness() -> schemas.Status:
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
        return problem_response(422, "; ".join(wrong), request.state.request_id)

    @api.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers) if error.headers else None
        return problem_response(error.status_code, str(error.detail), request.state.request_id, headers)

    @api.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        # Starlette raises it again; the guard logs it.
        return problem_response(500, "internal error", request.state.request_id)

    @api.exception_handler(LopError)
    async def wrong(request: Request, error: LopError) -> Response:
        return problem_response(422, str(error), request.state.request_id)


def _part(part: object) -> str:
    return ascii(part)[1:-1][:40] if isinstance(part, str) else str(part)


def _find(models: Mapping[str, ServedModel], name: str) -> ServedModel:
    if name not in models:
        raise HTTPException(404, f"model {name} is not offered: {', '.join(models)}")
    return models[name]


async def _allocate(model: ServedModel, asked: schemas.AllocationRequest, predict: Predict) -> dict[str, Any]:
    """The fields of `schemas.Allocation`.

    Raises:
        LopError: the target cannot be met, or the format has no place for the recovery.
    """
    footprint, target, space = _footprint(model, asked), asked.target.target(model.profiles), model.space
    # Many at once where many may have to be tried: the predictor is asked for them in one call.
    left = footprint.budgets(target, space)
    while budgets := list(islice(left, _TRIED_AT_ONCE)):
        if footprint.is_uniform(target):
            found = [footprint.even(space, budget) for budget in budgets]
        else:
            found = [Allocation(w) for w in await asyncio.gather(*(predict(model.name, budget) for budget in budgets))]
        for allocation in found:
            if footprint.meets(target, allocation.widths, space):
                answer = footprint.describe(allocation, space, target)
                # What was measured is the predictor's, of weights that are not quantised.
                is_known = footprint.bits == BITS[0] and not footprint.is_uniform(target)
                expected = _expected(model, asked.recovery, answer["ratio"]) if is_known else None
                nothing = {"groups": None, "memory": None, "latency": None}
                return {"model": model.name, **nothing, **answer, "expected_accuracy": expected}
    raise AssertionError("the least budget of a target meets it")


def _footprint(model: ServedModel, asked: schemas.AllocationRequest) -> Footprint:
    """What checkpoints take.

    Raises:
        LopError: the format has no place for the recovery, or the model is not offered with so many bits.
    """
    if asked.bits not in (offered := [BITS[0], *model.weights]):
        raise LopError(f"model {model.name} is not offered with {asked.bits} bits: bits is one of {offered}")
    quantised, recovery = model.weights.get(asked.bits), asked.recovery or model.recovery
    attention = model.space.attention
    return Footprint(model.size, asked.format, recovery, model.shape, model.source, quantised, attention)


def _device(name: str, profile: Profile, space: Space) -> schemas.Device:
    least, most = (space.by_part(ends(space).widths) for ends in (leanest, dense))
    ranges = {
        phase: schemas.Range(least=times.of(*least), largest=times.of(*most)) for phase, times in profile.phases.items()
    }
    return schemas.Device(name=name, description=profile.device, **ranges)


def _expected(model: ServedModel, recovery: str | None, ratio: float) -> dict[str, Any] | None:
    """The fields of `schemas.ExpectedAccuracy`."""
    curve = model.curve(recovery or model.recovery)
    accuracy = curve.at(ratio) if curve else None
    return {**_interval(accuracy), "recovery": curve.recovery} if curve and accuracy else None


def _model(model: ServedModel) -> schemas.Model:
    space, size = model.space, model.size
    footprint = Footprint(size, recovery=model.recovery, attention=space.attention)
    least, most = (ends(space).widths for ends in (leanest, dense))

    def byte_range(taken: Footprint) -> schemas.CountRange:
        return schemas.CountRange(least=taken.bytes(least), largest=taken.bytes(most))

    return schemas.Model(
        name=model.name,
        layers=space.layers,
        neurons=space.neurons,
        granularity=space.granularity,
        groups=space.attention.groups if space.attention else None,
        parameters=size.parameters,
        bytes=size.bytes,
        targets=schemas.Ranges(
            ratio=schemas.Range(least=0, largest=space.max_target),
            parameters=schemas.CountRange(least=footprint.parameters(least), largest=footprint.parameters(most)),
            bytes=byte_range(footprint),
        ),
        formats=list(FORMATS),
        recoveries=list(RECOVERIES),
        recovery=model.recovery,
        bits=[BITS[0], *model.weights],
        quantised=[
            schemas.Quantised(bits=bits, bytes=byte_range(replace(footprint, quantised=weight)))
            for bits, weight in model.weights.items()
        ],
        devices=[_device(name, profile, space) for name, profile in model.profiles.items()],
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


def _openapi(api: FastAPI, needs_key: bool) -> dict[str, Any]:
    if api.openapi_schema is None:
        document = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
        schemes = document["components"]
        schemes["schemas"]["Problem"] = schemas.Problem.model_json_schema()
        for name, schema in schemes["schemas"].items():
            if "examples" in schema:  # FastAPI has dropped their nulls.
                schema["examples"] = getattr(schemas, name).model_json_schema()["examples"]
        # Where no key is needed a generated client is not to ask for one.
        if needs_key:
            schemes["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in document["paths"].items():
                for operation in methods.values():
                    if path.startswith("/v1/"):
                        operation["security"] = [{"key": []}]
        api.openapi_schema = document
    return api.openapi_schema
