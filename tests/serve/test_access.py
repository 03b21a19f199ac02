"""Who is answered, how often, and what is logged of it."""

import http.client
import time
from pathlib import Path

import pytest

from tests.serve.conftest import Service, Start


def test_readiness_tells_what_is_missing(start: Start, tmp_path: Path) -> None:
    assert start(storage=tmp_path / "a").ask("GET", "/readyz").json == {"status": "ready"}
    answer = start(storage=tmp_path / "b", pruner=False).ask("GET", "/readyz")
    assert (answer.status, "pruner" in answer.json["detail"]) == (503, True)


def test_keys_are_needed_where_there_are_some(start: Start) -> None:
    service = start(keys=["a" * 16, "b" * 20])
    for path in ("/", "/healthz", "/readyz", "/openapi.json", "/page/main.js"):
        assert service.ask("GET", path).status == 200
    for headers in ({}, {"Authorization": "Bearer " + "c" * 16}, {"X-API-Key": "a"}, {"Authorization": "Basic x"}):
        refused = service.ask("GET", "/v1/models", headers=headers)
        assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
    for headers in (
        {"Authorization": "Bearer " + "a" * 16},
        {"X-API-Key": "b" * 20},
        {"Cookie": "lop_key=" + "a" * 16},
    ):
        assert service.ask("GET", "/v1/models", headers=headers).status == 200
    # Other sites can make a browser send cookies with what changes things; this one is for reading.
    asked = {"model": "tiny", "target": {"ratio": 0.3}}
    assert service.ask("POST", "/v1/allocations", asked, {"Cookie": "lop_key=" + "a" * 16}).status == 401


def test_without_keys_only_this_machine_is_answered(service: Service) -> None:
    assert service.ask("GET", "/v1/models", headers={"Host": "attacker.example"}).status == 403
    assert service.ask("GET", "/v1/models", headers={"Host": f"localhost:{service.port}"}).status == 200


def test_requests_are_limited_by_client(start: Start) -> None:
    service = start(keys=["a" * 16, "b" * 16], rate=0.01, burst=3)
    asked = [service.ask("GET", "/v1/models", headers={"X-API-Key": "a" * 16}) for _ in range(4)]
    assert [answer.status for answer in asked] == [200, 200, 200, 429]
    assert int(asked[-1].headers["retry-after"]) > 1
    assert service.ask("GET", "/v1/models", headers={"X-API-Key": "b" * 16}).status == 200


def test_event_streams_are_limited(start: Start) -> None:
    service = start(workers=0, streams=1)
    location = service.make({"ratio": 0.1}).headers["location"]
    first = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    first.request("GET", f"{location}/events")
    stream = first.getresponse()
    assert service.ask("GET", f"{location}/events").status == 429
    assert service.ask("DELETE", location).status == 204
    assert b"event: removed" in stream.read()
    location = service.make({"ratio": 0.2}).headers["location"]
    first.request("GET", f"{location}/events")
    assert first.getresponse().status == 200
    first.close()


def test_requests_are_logged_as_json_without_secrets(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    service = start(keys=["secret-" + "a" * 16])
    with caplog.at_level("INFO", "ray.serve"):
        answer = service.ask("GET", "/v1/models?x=1", headers={"Authorization": "Bearer secret-" + "a" * 16})
        service.ask("GET", "/v1/models", headers={"Authorization": "Bearer wrong-" + "a" * 16})
        while len(caplog.records) < 2:  # The second line is written once its answer is sent.
            time.sleep(0.01)
    fields = [vars(record) for record in caplog.records]
    assert [(line["method"], line["path"], line["status"]) for line in fields] == [
        ("GET", "/v1/models", 200),
        ("GET", "/v1/models", 401),
    ]
    assert fields[0]["request"] == answer.headers["x-request-id"]
    assert "secret" not in str(fields)
    assert "wrong" not in str(fields)
