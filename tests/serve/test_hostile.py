"""What nobody should send."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.serve.conftest import Answer, Service, Start

_KEY = "k" * 16
TRAVERSALS = (
    "../../etc/passwd", "..", ".", "/etc/passwd", "..\\..\\x", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "....//etc/passwd",
    "a\x00b", "file:///etc/passwd", "https://example.com/x", "//example.com/x", "org/model", "~root", "tiny/../tiny",
    "$(id)", "{{7*7}}", "\ud800", "t\u0131ny", "x" * 5000, "", " ", "jobs", "locks/store", "a;b", "a\r\nX: y", "-rf",
)  # fmt: skip
NUMBERS = (
    "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1e-400", "-0.0", "-1", "1", "0.9999999999999999", "5e-324",
    "1" * 5000, "9223372036854775808", "-9223372036854775809", "0x10", "1_000", "true", "null", '"0.3"', "[0.3]",
    '{"a":1}', "0.3.3",
)  # fmt: skip
BODIES = (
    b"", b"null", b"[]", b"{}", b"3", b'"x"', b"{", b"\xff\xfe", b"[" * 30_000, b'{"model":' * 5_000, b'{"a":1}' * 2,
    b'{"model":"tiny","target":{"ratio":0.3},"extra":1}', b'{"model":"tiny","target":{"ratio":0.3,"bytes":5000000}}',
    b'{"model":"tiny","target":{}}', b'{"model":"tiny","target":{"ratios":0.3}}',
    b'{"model":["tiny"],"target":{"ratio":0.3}}',
    b'{"model":"tiny","target":[["ratio",0.3]]}', b'{"__proto__":{},"model":"tiny"}', b'{"model":"tiny","model":{}}',
)  # fmt: skip


def harmless(answer: Answer) -> None:
    """A refusal that a client can read, and that shows nothing of the inside."""
    assert 400 <= answer.status < 500, (answer.status, answer.body[:300])
    assert b"Traceback" not in answer.body
    assert b'File "' not in answer.body
    if answer.headers.get("content-type") == "application/problem+json":
        assert answer.json["status"] == answer.status
        assert len(answer.body) < 2000


@pytest.fixture
def unchanged(service: Service, tmp_path: Path) -> Iterator[None]:
    """Nothing appears outside the storage folder, and no checkpoint in it."""

    def seen() -> set[Path]:
        root = service.settings.storage
        return {
            *root.parent.iterdir(),
            *Path.cwd().iterdir(),
            *(root / "jobs").iterdir(),
            *(root / "checkpoints").iterdir(),
        }

    before = seen()
    yield
    assert seen() == before


@pytest.mark.usefixtures("unchanged")
def test_paths_in_every_field(service: Service) -> None:
    fine = {"model": "tiny", "target": {"ratio": 0.3}, "format": "hf", "recovery": "none"}
    for text in TRAVERSALS:
        for field in fine:
            harmless(service.ask("POST", "/v1/checkpoints", fine | {field: text}))
        for key in ("ratio", text):
            harmless(service.ask("POST", "/v1/allocations", {"model": "tiny", "target": {key: text}}))
        harmless(service.ask("POST", "/v1/checkpoints", {**fine, text: text}))
        safe = quote(text.encode("utf-8", "surrogatepass"), safe="")
        for path in (f"{safe}/x", f"x/{safe}", safe):
            if path.strip("/."):
                harmless(service.ask("GET", f"/v1/checkpoints/{path}/files/{safe or 'x'}"))
        harmless(service.ask("GET", f"/v1/checkpoints/{'0' * 32}/files/{safe or 'x'}"))
        harmless(service.ask("DELETE", f"/v1/checkpoints/{safe or 'x'}"))
        harmless(service.ask("GET", f"/page/{safe or 'x'}"))
        harmless(service.ask("GET", f"/v1/checkpoints?after={safe or 'x'}"))
        harmless(service.ask("GET", f"/v1/checkpoints?limit={safe or 'x'}"))


def test_paths_to_the_files_of_a_checkpoint_that_is_there(service: Service) -> None:
    id = service.make({"ratio": 0.5}).json["id"]
    service.finish(id)
    for path in (
        "../../../jobs",
        f"..%2f..%2fjobs%2f{id}.json",
        f"%2e%2e/{id}/config.json",
        "config.json%00",
        ".lop",
        "%2Fetc%2Fpasswd",
    ):
        harmless(service.ask("GET", f"/v1/checkpoints/{id}/files/{path}"))
    assert service.ask("DELETE", f"/v1/checkpoints/{id}").status == 204


@pytest.mark.usefixtures("unchanged")
def test_numbers(service: Service) -> None:
    for text in NUMBERS:
        for kind in ("ratio", "parameters", "bytes"):
            for path in ("allocations", "checkpoints"):
                body = f'{{"model":"tiny","target":{{"{kind}":{text}}}}}'.encode()
                if text in ("1e-400", "-0.0", "5e-324") and kind == "ratio":
                    if path == "allocations":  # Nothing, or next to it: fine to ask for.
                        assert service.ask("POST", f"/v1/{path}", body).status == 200
                    continue
                harmless(service.ask("POST", f"/v1/{path}", body))
    for limit in ("0", "101", "-1", "1e9", "NaN", "9" * 5000):
        harmless(service.ask("GET", f"/v1/checkpoints?limit={limit}"))


@pytest.mark.usefixtures("unchanged")
def test_bodies(service: Service) -> None:
    for body in BODIES:
        harmless(service.ask("POST", "/v1/checkpoints", body))
        harmless(service.ask("POST", "/v1/allocations", body))
    fine = json.dumps({"model": "tiny", "target": {"ratio": 0.3}}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "image/png"):
        harmless(service.ask("POST", "/v1/checkpoints", fine, {"Content-Type": kind}))
    for method, path in (("PUT", "/v1/models"), ("POST", "/v1/models"), ("PATCH", "/"), ("DELETE", "/v1/checkpoints")):
        assert service.ask(method, path).status == 405
    assert service.ask("GET", "/v1").status == 404


@pytest.mark.usefixtures("unchanged")
def test_enormous_bodies(service: Service) -> None:
    head = f"POST /v1/checkpoints HTTP/1.1\r\nHost: localhost:{service.port}\r\nContent-Type: application/json\r\n"
    # Announced: refused before any of it is sent. Not announced: after the limit.
    assert b" 413 " in _raw(service, head + "Content-Length: 10485760\r\n\r\n")
    assert b" 413 " in _raw(service, head + "Content-Length: 999999999999999999\r\n\r\n")
    chunk = f"{2**16:x}\r\n{'x' * 2**16}\r\n"
    assert b" 413 " in _raw(service, head + "Transfer-Encoding: chunked\r\n\r\n" + chunk * 160)
    for length in ("-5", "9" * 30, "1_0", "٣"):
        assert b" 400 " in _raw(service, head + f"Content-Length: {length}\r\n\r\n")


def test_slow_bodies_are_given_up(start: Start) -> None:
    service = start(body_seconds=0.5)
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/checkpoints HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 50\r\n\r\n{"
        )
        connection.setblocking(False)
        answer = b""
        for _ in range(100):
            time.sleep(0.1)
            with contextlib.suppress(OSError):  # Given up, with an answer that is still to be read.
                connection.sendall(b" ")
            with contextlib.suppress(BlockingIOError):
                answer = connection.recv(4096)
                break
        assert b" 408 " in answer
    assert service.ask("GET", "/healthz").status == 200


@pytest.mark.usefixtures("unchanged")
def test_headers(service: Service) -> None:
    for headers in (
        {"X-Request-ID": "x" * 3000},
        {"X-Request-ID": '"} {"forged":1'},
        {"Cookie": 'lop_key="\\; a=b; =;;'},
        {"Authorization": "Bearer " + "é" * 100},
        {"Range": "bytes=" + ",".join(["0-1"] * 500)},
        {"Accept": "*/*, " * 500},
    ):
        answer = service.ask("GET", "/v1/models", headers=headers)
        assert answer.status == 200
        assert answer.headers.get("x-request-id", "") != headers.get("X-Request-ID")


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_schemathesis_finds_nothing(start: Start, mode: GenerationMode) -> None:
    service = start(keys=[_KEY], workers=0, queue=3)
    document = service.ask("GET", "/openapi.json").json
    schema = schemathesis.openapi.from_dict(document)
    budget = settings(
        max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        seen.add(operation.path)

        @budget
        @given(case=operation.as_strategy(mode))
        def run(case: schemathesis.Case) -> None:
            # A ratio below 1 fits the schema, and may still be more than a model can lose: that is 422 too.
            case.call_and_validate(
                base_url=service.url,
                headers={"Authorization": f"Bearer {_KEY}"},
                excluded_checks=[positive_data_acceptance],
            )

        with contextlib.suppress(Unsatisfiable):  # Of an operation without inputs nothing can be wrong.
            run()
    assert len(seen) == 8


def _raw(service: Service, text: str) -> bytes:
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        with contextlib.suppress(OSError):  # Refused while we were still sending.
            connection.sendall(text.encode())
        answer = b""
        while b"\r\n" not in answer:
            try:
                block = connection.recv(4096)
            except OSError:
                break
            if not block:
                break
            answer += block
        return answer
