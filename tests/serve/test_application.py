"""The application on Ray Serve, as `lop serve` starts it, and what it outlives."""

import contextlib
import http.client
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve import Application
from ray.serve.schema import DeploymentSchema, ServeDeploySchema

import lop
from lop.checkpoint.export import verify
from lop.cli import main
from serve.app import ApiDeployment, PredictorDeployment, PrunerDeployment
from serve.settings import ServiceSettings

_ROOT = Path(__file__).parents[2]


class Running:
    """`lop serve` in a process of its own, with all that it started."""

    def __init__(self, storage: Path, *options: str) -> None:
        self.storage = storage
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "lop", "serve", "--storage", storage, "--port", str(self.port), *options]
        environment = {**os.environ, "RAY_enable_worker_prestart": "0"}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            # Tests may run in the background of a shell, which has its jobs ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert self.process.stdout
        first_line = self.process.stdout.readline()
        assert first_line == f"http://127.0.0.1:{self.port}/\n", "the service did not start"
        self.client = lop.Client(f"http://127.0.0.1:{self.port}", timeout=240)

    def pids(self, name: str = "") -> list[int]:
        """The processes below this one whose command line holds a text."""
        parents, found = {self.process.pid}, []
        listing = subprocess.run(
            ["ps", "-eo", "pid,ppid,args", "--sort=pid"], capture_output=True, text=True, check=True
        )
        rows = [line.split(None, 2) for line in listing.stdout.splitlines()[1:]]
        for _ in range(6):
            parents |= {int(pid) for pid, parent, *_ in rows if int(parent) in parents}
        for pid, _, *arguments in rows:
            if int(pid) in parents and name in (arguments or [""])[0]:
                found.append(int(pid))
        return found

    def kill(self) -> None:
        """SIGKILL for all of it, as when a machine loses power."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage") / "s"


def until(condition: Callable[[], Any], seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)
    return found


def states(storage: Path) -> dict[str, str]:
    return {path.stem: json.loads(path.read_text())["state"] for path in (storage / "jobs").glob("*.json")}


@pytest.mark.timeout(900)  # Two starts of Ray and Serve, which on a busy machine take minutes.
def test_exports_outlive_their_replica_and_the_whole_service(storage: Path) -> None:
    accepted: dict[str, list[int]] = {}
    service = Running(storage)
    try:
        for ratio in (0.1, 0.3):
            made = service.client.make("tiny", ratio=ratio)
            accepted[made["id"]] = made["allocation"]["widths"]
        (pruner,) = service.pids("ServeReplica:lop:pruner")
        until(lambda: "running" in states(storage).values())
        os.kill(pruner, signal.SIGKILL)
        until(lambda: list(states(storage).values()).count("complete") >= 1)
        (another,) = until(lambda: service.pids("ServeReplica:lop:pruner"))
        assert another != pruner
        made = service.client.make("tiny", ratio=0.5)
        accepted[made["id"]] = made["allocation"]["widths"]
        until(lambda: "running" in states(storage).values())
    finally:
        service.kill()
    assert set(states(storage)) == set(accepted)
    assert {"queued", "running"} & set(states(storage).values())
    assert list((storage / "scratch").iterdir()) != []
    service = Running(storage)
    try:
        until(lambda: set(states(storage).values()) == {"complete"})
        listed = service.client._json("GET", "/v1/checkpoints?limit=100")["checkpoints"]
        assert sorted(each["id"] for each in listed) == sorted(accepted)
        for each in listed:
            assert verify(Path(each["path"]))["widths"] == accepted[each["id"]] == each["allocation"]["widths"]
        assert {folder.name for folder in (storage / "checkpoints").iterdir()} == set(accepted)
        assert until(lambda: not list((storage / "scratch").iterdir()))
        _equals_what_lop_prune_writes(storage, listed[0])
        _everything_answers(service)
        _stops_in_the_middle_of_an_export(service)
    finally:
        service.kill()


def test_a_service_that_is_told_to_stop_has_not_failed(storage: Path) -> None:
    service = Running(storage)
    try:
        started = service.pids()
        service.process.terminate()
        assert service.process.wait(timeout=60) == 0
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
    finally:
        service.kill()


def _equals_what_lop_prune_writes(storage: Path, checkpoint: dict[str, Any]) -> None:
    out = storage.parent / "pruned"
    assert main(["prune", "--target", str(checkpoint["target"]["ratio"]), "--out", str(out)]) == 0
    assert checkpoint["recovery"] == "refit"
    names = {file.name for file in out.iterdir()}
    assert names == {file.name for file in Path(checkpoint["path"]).iterdir()}
    for name in names:
        assert (out / name).read_bytes() == (Path(checkpoint["path"]) / name).read_bytes(), name


def _stops_in_the_middle_of_an_export(service: Running) -> None:
    """Ctrl-C, which a terminal sends to all processes of the command, leaves none of them."""
    id = service.client.make("tiny", ratio=0.6)["id"]
    until(lambda: states(service.storage)[id] == "running")
    started = service.pids()
    os.killpg(service.process.pid, signal.SIGINT)
    assert service.process.wait(timeout=120) == 130
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
    assert states(service.storage)[id] != "failed"


def _everything_answers(service: Running) -> None:
    """What the API's own tests see without Serve, once through Serve's proxy."""
    assert service.client._json("GET", "/readyz") == {"status": "ready"}
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)

    def ask(method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    status, body = ask("GET", "/", None)
    assert (status, b"<title>LOP" in body) == (200, True)
    (first, *_) = service.client._json("GET", "/v1/checkpoints?limit=1")["checkpoints"]
    whole = (Path(first["path"]) / "model.safetensors").read_bytes()
    url = first["files"]["model.safetensors"]["url"]
    assert ask("GET", url, Range="bytes=100000-299999") == (206, whole[100_000:300_000])
    status, body = ask("GET", f"{first['url']}/events")
    assert (status, body.startswith(b"event: checkpoint\ndata: {")) == (200, True)
    assert ask("POST", "/v1/allocations", b"[" * 10**7, **{"Content-Type": "application/json"})[0] == 413
    connection.close()
    assert ask("GET", "/v1/models", Host="attacker.example")[0] == 403
    assert ask("GET", "/../../etc/passwd")[0] == 404


def test_wrong_settings_are_refused_by_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOP_API_KEYS", raising=False)

    def refused(*arguments: str) -> str:
        assert main(["serve", *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    short = tmp_path / "short"
    short.write_text("short\n")
    assert "API key 1" in refused("--keys", str(short))
    assert "none" in refused("--run", str(tmp_path / "none"))
    assert "quotta" in refused("--set", "quotta=3")
    assert "queue" in refused("--set", "queue=many")
    assert "70000" in refused("--port", "70000")
    assert "API keys" in refused("--host", "0.0.0.0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "in use" in refused("--port", port)
    assert str(short) in refused("--port", port, "--storage", str(short))
    assert "nothing" in refused("--port", port, "--set", "models={a: {config: nothing}}")


def _configs() -> dict[str, Any]:
    service = next(yaml.safe_load_all((_ROOT / "kuberay" / "serve.yaml").read_text()))
    return {
        "config.yaml": yaml.safe_load((_ROOT / "serve" / "config.yaml").read_text()),
        "kuberay": yaml.safe_load(service["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", ["config.yaml", "kuberay"])
def test_a_config_passes_rays_schema_and_builds_the_application(name: str, tmp_path: Path) -> None:
    config = ServeDeploySchema.model_validate(_configs()[name])
    (application,) = config.applications
    settings = ServiceSettings.model_validate(application.args)
    assert settings.storage.is_absolute()
    module, _, builder = application.import_path.partition(":")
    built = getattr(importlib.import_module(module), builder)(settings.model_copy(update={"storage": tmp_path}))
    assert isinstance(built, Application)
    deployed = {each.name for each in (ApiDeployment, PredictorDeployment, PrunerDeployment)}
    # Ray takes a misspelt name for a deployment, or a setting of one, without a word until it is deployed.
    assert {each.name for each in application.deployments} <= deployed
    known = set(DeploymentSchema.model_fields)
    assert all(set(each) <= known for each in _configs()[name]["applications"][0].get("deployments", ()))
    # Only with keys, which a cluster's secret brings, on other addresses than this machine's own.
    assert (config.http_options.host == "127.0.0.1") == (name == "config.yaml")
