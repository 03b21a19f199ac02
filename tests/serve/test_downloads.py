"""Checkpoints over HTTP: whole, in parts, broken off and gone on with, by curl, httpx and the client."""

import re
import select
import shlex
import shutil
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

import lop
from lop.checkpoint.export import verify
from tests.serve.conftest import Answer, Service, Start


def test_a_checkpoint_is_made_once_and_downloads_in_parts(start: Start, tmp_path: Path) -> None:
    service = start()
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: service.make({"ratio": 0.3}), range(20)))
    (id,) = {answer.json["id"] for answer in answers}
    assert {(answer.status, answer.headers["location"]) for answer in answers} == {(202, f"/v1/checkpoints/{id}")}
    last = service.finish(id)
    assert last["state"] == "complete"
    # Another wording of the same size is the same checkpoint.
    assert service.make({"bytes": last["allocation"]["bytes"]}).json["id"] == id
    assert len(service.finished) == 1
    assert verify(Path(last["path"]))["widths"] == last["allocation"]["widths"]
    whole = (Path(last["path"]) / "model.safetensors").read_bytes()
    file = last["files"]["model.safetensors"]
    assert file["bytes"] == len(whole)
    middle = service.ask("GET", file["url"], headers={"Range": "bytes=1000-1999"})
    assert (middle.status, middle.body) == (206, whole[1000:2000])
    assert middle.headers["content-range"] == f"bytes 1000-1999/{len(whole)}"
    rest = service.ask("GET", file["url"], headers={"Range": "bytes=2000-", "If-Range": middle.headers["etag"]})
    assert rest.body == whole[2000:]
    changed = service.ask("GET", file["url"], headers={"Range": "bytes=2000-", "If-Range": '"other"'})
    assert (changed.status, changed.body) == (200, whole)
    head = service.ask("HEAD", file["url"])
    assert (head.status, head.headers["content-length"]) == (200, str(len(whole)))
    for bad, status in (("bytes=999999999-", 416), ("bytes=x", 400), ("bytes=5-1", 400)):
        assert service.ask("GET", file["url"], headers={"Range": bad}).status == status


def test_downloads_go_on_where_they_broke_off(service: Service) -> None:
    made = service.finish(service.make({"ratio": 0.15}).json["id"])
    file = made["files"]["model.safetensors"]
    whole = (Path(made["path"]) / "model.safetensors").read_bytes()
    size, etag = len(whole), f'"{file["sha256"]}"'

    def ask(method: str = "GET", **headers: str) -> Answer:
        answer = service.ask(method, file["url"], headers={k.replace("_", "-"): v for k, v in headers.items()})
        assert answer.status >= 400 or answer.headers["etag"] == etag
        return answer

    for answer in (ask("HEAD"), ask("HEAD", Range="bytes=5-9"), ask("HEAD", Range="bytes=9-5")):
        assert (answer.status, answer.headers["content-length"], answer.body) == (200, str(size), b"")
        assert answer.headers["accept-ranges"] == "bytes"
    for unchanged in (etag, ask("HEAD").headers["last-modified"]):
        rest = ask(Range=f"bytes={size // 2}-", If_Range=unchanged)
        assert (rest.status, rest.body) == (206, whole[size // 2 :])
        assert rest.headers["content-range"] == f"bytes {size // 2}-{size - 1}/{size}"
    for other in ('"other"', f"W/{etag}", "Thu, 01 Jan 1970 00:00:00 GMT"):
        again = ask(Range=f"bytes={size // 2}-", If_Range=other)
        assert (again.status, again.body) == (200, whole)
    for wanted, span in ((whole[-7:], "-7"), (whole, f"-{9 * size}"), (whole[9:], f"9-{9 * size}")):
        part = ask(Range=f"bytes={span}")
        assert (part.status, part.body) == (206, wanted)
    assert ask(Range="lines=1-2").status == 200
    beyond = ask(Range=f"bytes={size}-")
    assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    assert beyond.json["detail"] == f"Range: the file has {size} bytes"
    for known in (etag, f'"x", W/{etag}', "*"):
        for method in ("GET", "HEAD"):
            same = ask(method, If_None_Match=known, Range="bytes=0-1")
            assert (same.status, same.body) == (304, b"")
    assert ask(If_None_Match='"x"').body == whole


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_documented_curl_never_makes_a_corrupt_file(start: Start, tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "service.md").read_text()
    (line,) = re.findall(r"^\$ (curl .*/files/\S+)", guide, flags=re.MULTILINE)

    def curl(service: Service) -> int:
        command = shlex.split(line.replace("localhost:8000", service.url).replace("$ID", id))
        return subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60).returncode

    early = start(workers=0)
    id = early.make({"ratio": 0.3}).json["id"]
    refused = early.ask("GET", f"/v1/checkpoints/{id}/files/model.safetensors")
    assert (refused.status, int(refused.headers["retry-after"]) > 0) == (409, True)
    assert curl(early) != 0
    assert list(tmp_path.glob("model*")) == []
    service = start()
    whole = (Path(service.finish(id)["path"]) / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    for arrived in (0, len(whole) // 2):
        file.write_bytes(whole[:arrived])
        assert curl(service) == 0
        assert file.read_bytes() == whole
    curl(service)  # There is nothing left to come, which older curls call an error.
    assert file.read_bytes() == whole


def test_the_client_goes_on_where_a_connection_broke_off(service: Service, tmp_path: Path) -> None:
    broken = 0

    def cut(listener: socket.socket) -> None:
        """Passes on what is said between client and service, and breaks off each answer after a megabyte."""
        nonlocal broken
        with suppress(OSError):  # The listener is closed.
            while True:
                client, _ = listener.accept()
                sent = 0
                with client, socket.create_connection(("127.0.0.1", service.port)) as upstream:
                    while sent < 2**20:
                        source, *_ = select.select([client, upstream], [], [])[0]
                        if not (data := source.recv(2**16)):
                            break
                        (upstream if source is client else client).sendall(data)
                        sent += len(data)
                broken += sent >= 2**20

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=cut, args=(listener,))
        thread.start()
        client = lop.Client(f"http://127.0.0.1:{listener.getsockname()[1]}")
        try:
            folder = client.get("tiny", ratio=0.15, recovery="none", out=tmp_path / "out")
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=30)
    assert broken >= 2
    verify(folder)


def test_a_damaged_download_is_told(service: Service, tmp_path: Path) -> None:
    client = lop.Client(service.url)
    id = client.make("tiny", ratio=0.45, recovery="none")["id"]
    file = Path(service.finish(id)["path"]) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(lop.LopError, match=r"model\.safetensors did not arrive"):
        client.get("tiny", ratio=0.45, recovery="none", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    client.remove(id)
