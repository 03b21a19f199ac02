"""What stands between the network and the API: keys, limits, request ids, logs. Plain ASGI, a few microseconds each."""

import asyncio
import ipaddress
import json
import logging
import re
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.keys import Keys

log = logging.getLogger("ray.serve")
COOKIE = "lop_key"
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN_PATHS = ("/", "/healthz", "/readyz", "/openapi.json")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_CLIENTS = 10_000
_SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


@dataclass(frozen=True)
class Limits:
    """See `serve.settings.ServiceSettings`."""

    rate: float
    burst: int
    body_limit: int
    body_seconds: float


class RefusedError(Exception):
    """A request that is answered without asking the API."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


class TokenBuckets:
    """`rate` requests a second and `burst` at once for each client; the longest silent are forgotten."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, now: float) -> float:
        """Seconds to wait before the next request is welcome; 0 if this one is."""
        tokens, then = self._buckets.pop(client, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - then) * self._rate)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - allowed, now)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - tokens) / self._rate


class Guard:
    """An ASGI application around the API.

    With keys, everything below `/v1/` needs one, as `Authorization: Bearer KEY` or `X-API-Key: KEY`; a browser's
    downloads, which cannot set headers, may send it as a cookie, for reading only. Without keys only requests from this
    machine, to one of its own names, are answered: the name keeps other web sites from reaching in through a browser.
    """

    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits) -> None:
        self._app, self._keys, self._limits = app, keys, limits
        self._buckets = TokenBuckets(limits.rate, limits.burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        began = time.perf_counter()
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        request_id = headers.get(b"x-request-id", "")
        # Serve's proxy names each request, and sends the name back itself.
        is_named = bool(_ID.fullmatch(request_id))
        if not is_named:
            request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, client = 0, "-"

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [] if is_named else [(b"x-request-id", request_id.encode())]
                message = {**message, "headers": [*message.get("headers", ()), *own, *_SECURITY_HEADERS]}
            await send(message)

        try:
            client = self._client(scope, headers)
            self._check_rate(client)
            await self._app(scope, await self._body(receive, headers), answer)
        except RefusedError as refusal:
            if status == 0:
                await answer_problem(answer, refusal.status, refusal.detail, request_id, refusal.headers)
        except Exception:
            log.exception("request %s", request_id)
            if status == 0:
                await answer_problem(answer, 500, "internal error", request_id)
        finally:
            fields = {
                "request": request_id,
                "method": scope["method"],
                "path": scope["path"][:256],
                "status": status,
                "client": client,
                "milliseconds": round((time.perf_counter() - began) * 1000, 2),
            }
            # Serve writes `extra` as fields of the line's JSON object.
            log.info("request answered", extra=fields)

    def _client(self, scope: Scope, headers: dict[bytes, str]) -> str:
        """Who asks: a key's short name, or an address."""
        address = (scope.get("client") or ("unknown", 0))[0]
        if not self._keys:
            if not is_loopback(address) or _host_name(headers.get(b"host", "")) not in _LOCAL_NAMES:
                raise RefusedError(403, "this service has no API keys and therefore answers its own machine only")
            return address
        if scope["path"] in _OPEN_PATHS or scope["path"].startswith("/page/"):
            return address
        owner = self._keys.owner(_key(headers, reading=scope["method"] in ("GET", "HEAD")))
        if owner is None:
            # Guessing is slowed down by the limit of the address.
            self._check_rate(address)
            detail = "an API key is needed: Authorization: Bearer KEY"
            raise RefusedError(401, detail, {"www-authenticate": "Bearer"})
        return owner

    def _check_rate(self, client: str) -> None:
        if wait := self._buckets.take(client, time.monotonic()):
            raise RefusedError(429, "too many requests", {"retry-after": str(int(wait) + 1)})

    async def _body(self, receive: Receive, headers: dict[bytes, str]) -> Receive:
        """`receive` with the whole body read, unless it is too large or too slow."""
        limit, seconds = self._limits.body_limit, self._limits.body_seconds
        length = headers.get(b"content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise RefusedError(400, "Content-Length is not a number")
        # A number of thousands of digits is not worth reading.
        if len(length) > 18 or int(length) > limit:
            raise RefusedError(413, f"the body is larger than {limit} bytes")
        if int(length) == 0 and b"transfer-encoding" not in headers:
            return receive
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return receive
                    chunks.append(message.get("body", b""))
                    if sum(map(len, chunks)) > limit:
                        raise RefusedError(413, f"the body is larger than {limit} bytes")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise RefusedError(408, f"the body did not arrive within {seconds:g} s") from None
        whole: Message | None = {"type": "http.request", "body": b"".join(chunks), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        return replay


async def answer_problem(
    send: Send, status: int, detail: str, request_id: str, headers: dict[str, str] | None = None
) -> None:
    """Sends an error as RFC 9457 has it."""
    body = json.dumps(problem(status, detail, request_id)).encode()
    pairs = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    pairs += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def problem(status: int, detail: str, request_id: str) -> dict[str, object]:
    """The members of a problem document."""
    title = HTTPStatus(status).phrase
    return {"type": "about:blank", "title": title, "status": status, "detail": detail, "request_id": request_id}


def is_loopback(address: str) -> bool:
    """Whether an address, or `localhost`, is this machine's own."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address == "localhost"
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def _host_name(host: str) -> str:
    return re.sub(r":\d*$", "", host).lower()


def _key(headers: dict[bytes, str], *, reading: bool) -> str:
    scheme, _, key = headers.get(b"authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    if key := headers.get(b"x-api-key", ""):
        return key
    if reading and (cookies := headers.get(b"cookie", "")):
        try:
            morsel = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return ""
        return morsel.value if morsel else ""
    return ""
