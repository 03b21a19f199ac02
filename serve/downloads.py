"""What a checkpoint's own addresses answer: its state, its files, its events."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import FastAPI, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.staticfiles import NotModifiedResponse
from starlette.types import Receive, Scope, Send

from serve import schemas
from serve.guard import problem
from serve.job import UNFINISHED, Job
from serve.jobs import JobStore
from serve.schemas import problems

_FILE = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"
_POLL_SECONDS = 0.2
_HEARTBEAT_SECONDS = 15
_STREAM_SECONDS = 3600
RETRY_SECONDS = 10
ID = r"^[0-9a-f]{32}$"
Id = Annotated[str, PathParameter(pattern=ID, examples=["0" * 32])]


def add_files(api: FastAPI, store: JobStore) -> None:
    @api.head("/v1/checkpoints/{id}/files/{name}", include_in_schema=False)
    @api.get(
        "/v1/checkpoints/{id}/files/{name}",
        summary="Download a file",
        tags=["checkpoints"],
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
    def download_file(
        id: Id, name: Annotated[str, PathParameter(pattern=_FILE, examples=["model.safetensors"])]
    ) -> FileResponse:
        job = find_job(store, id)
        if job.state in UNFINISHED:
            raise HTTPException(409, f"the checkpoint is {job.state}", {"Retry-After": str(RETRY_SECONDS)})
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
            await problem_response(started["status"], detail, request_id, headers)(scope, receive, send)


def add_events(api: FastAPI, store: JobStore, streams: int) -> None:
    slots = asyncio.Semaphore(streams)

    @api.get(
        "/v1/checkpoints/{id}/events",
        summary="Follow a checkpoint",
        tags=["checkpoints"],
        description="Server-sent events: `checkpoint` with the state each time that something changes, the "
        "last of them "
        "with a final state; `removed` if it is deleted meanwhile.",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}, "description": "Events"}, **problems(404, 422)},
    )
    async def follow_checkpoint(id: Id) -> StreamingResponse:
        await run_sync(find_job, store, id)
        if slots.locked():
            raise HTTPException(429, "too many event streams", {"Retry-After": str(RETRY_SECONDS)})
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
        text = (await run_sync(describe, job, store)).model_dump_json()
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


def problem_response(status: int, detail: str, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(problem(status, detail, request_id), status, headers, "application/problem+json")


def find_job(store: JobStore, id: str) -> Job:
    job = store.get(id)
    if job is None:
        raise HTTPException(404, "there is no such checkpoint")
    return job


def describe(job: Job, store: JobStore) -> schemas.Checkpoint:
    progress = store.progress(job.id) if job.state == "running" else None
    return schemas.Checkpoint(
        id=job.id,
        state=job.state,
        model=job.asked.model,
        target=dict(job.asked.target),
        format=job.asked.format,
        recovery=job.asked.recovery,
        bits=job.asked.bits,
        allocation=schemas.Allocation(**job.allocation),
        progress=schemas.Progress(**progress) if progress else None,
        error=job.error,
        bytes=job.bytes,
        files={name: schemas.File(**about, url=f"{url_of(job.id)}/files/{name}") for name, about in job.files.items()},
        path=str(store.folder(job)) if job.state == "complete" else None,
        url=url_of(job.id),
        created=job.created,
        started=job.started,
        finished=job.finished,
    )


def url_of(id: str) -> str:
    return f"/v1/checkpoints/{id}"
