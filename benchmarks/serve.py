"""Requests a second of `POST /v1/allocations`, beside Serve's own floor: `python benchmarks/serve.py`.

Both are measured through Serve's HTTP proxy, in turns, with the same client and the same requests, each of which asks
for another target. The floor is a bare FastAPI deployment on Serve that reads the same JSON body and sends an answer of
the same size: no model, no predictor, no limits, no request log of its own.

The service is measured twice: as it comes, remembering the answer for each number of neurons to keep (different targets
may come to the same number: the embedded model has a few hundred of them), and asking the predictor every time. Prints
a table, and as the last line JSON; `share_of_floor` is that of the service as it comes, `share_asking` of the other.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PORT = 8765
# Python looks beside a script first, where `serve` would be this very file.
sys.path[0] = str(Path(__file__).resolve().parents[1])


@dataclass(frozen=True)
class Measured:
    """One stretch of load: what came back, and how long each answer took in milliseconds, ascending."""

    seconds: float
    milliseconds: list[float]
    errors: int

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return len(self.milliseconds) / self.seconds

    def percentile(self, share: float) -> float:
        """Milliseconds that this share of the answers took at most."""
        return self.milliseconds[min(int(share * len(self.milliseconds)), len(self.milliseconds) - 1)]


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description="The service's allocations a second, beside Serve's own floor.")
    parser.add_argument("--seconds", type=float, default=60, help="of load on the service, and on the floor")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4, help="the two take turns, so that both see the same machine")
    options = parser.parse_args()
    with running() as (floor, service, asking):
        for path in (floor, service, asking):
            asyncio.run(load(path, seconds=3, connections=options.connections, first=0))
        part = options.seconds / options.rounds
        rounds: dict[str, list[Measured]] = {floor: [], service: [], asking: []}
        sent = 100_000
        for _ in range(options.rounds):
            for path, measured in rounds.items():
                measured.append(asyncio.run(load(path, seconds=part, connections=options.connections, first=sent)))
                sent += 100_000
    floors, services = rounds[floor], rounds[service]
    shares = [ours.rate / bare.rate for ours, bare in zip(services, floors)]
    whole = together(services)
    bare, always = together(floors), together(rounds[asking])
    print(f"{'':<8} {'requests/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'errors':>7}")
    for name, each in (("floor", bare), ("service", whole), ("asking", always)):
        print(
            f"{name:<8} {each.rate:>10.1f} {each.percentile(0.5):>8.1f} {each.percentile(0.99):>8.1f} {each.errors:>7}"
        )
    print(
        json.dumps(
            {
                "benchmark": "serve",
                "share_of_floor": whole.rate / bare.rate,
                "requests_per_second": whole.rate,
                "p50_ms": whole.percentile(0.5),
                "p99_ms": whole.percentile(0.99),
                "errors": whole.errors,
                "share_asking": always.rate / bare.rate,
                "asking_requests_per_second": always.rate,
                "asking_errors": always.errors,
                "floor_requests_per_second": bare.rate,
                "floor_p50_ms": bare.percentile(0.5),
                "floor_p99_ms": bare.percentile(0.99),
                "floor_errors": bare.errors,
                "shares_by_round": shares,
                "share_spread": statistics.pstdev(shares),
                "seconds": whole.seconds,
                "connections": options.connections,
                "proxy": "haproxy" if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else "default",
                "cpus": os.cpu_count(),
                "python": platform.python_version(),
            }
        )
    )


@contextlib.contextmanager
def running() -> Iterator[tuple[str, str, str]]:
    """All applications on one Serve; yields the paths of the floor, the service and the service that always asks."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOME"] = folder
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        import ray
        from ray import serve

        from serve.app import app
        from serve.settings import ServiceSettings

        # Ray's CPUs are what deployments reserve, not what there is: all three must fit.
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": _PORT})
        settings = ServiceSettings(storage=Path(folder) / "storage", rate=1e6, burst=10**6)
        serve.run(app(settings), name="service", route_prefix="/")
        asking = settings.model_copy(update={"storage": Path(folder) / "asking", "answers": 0})
        serve.run(app(asking), name="asking", route_prefix="/asking")
        answer = asyncio.run(_one("/v1/allocations", 0.3))
        serve.run(floor_app(answer), name="floor", route_prefix="/floor")
        yield "/floor/v1/allocations", "/v1/allocations", "/asking/v1/allocations"
        serve.shutdown()
        ray.shutdown()


def floor_app(answer: str):  # type: ignore[no-untyped-def]
    """The application without the model: the same body read by FastAPI, the same number of bytes back."""
    from fastapi import FastAPI, Response
    from ray import serve

    from serve.schemas import AllocationRequest

    api = FastAPI()

    @api.post("/v1/allocations")
    async def allocate(asked: AllocationRequest) -> Response:
        return Response(answer, media_type="application/json")

    @serve.deployment(max_ongoing_requests=512, ray_actor_options={"num_cpus": 0.25})
    @serve.ingress(api)
    class Floor:
        pass

    return Floor.bind()


async def load(path: str, *, seconds: float, connections: int, first: int) -> Measured:
    """Keeps each connection busy with one request after the other, none of which asks for the same target."""
    targets = iter(range(first, first + 10**9))
    found: list[float] = []
    errors = 0
    end = time.perf_counter() + seconds

    async def connection() -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection("127.0.0.1", _PORT)
        while time.perf_counter() < end:
            began = time.perf_counter()
            try:
                status, _ = await _ask(reader, writer, path, _target(next(targets)))
            except (OSError, asyncio.IncompleteReadError, ValueError):
                status = 0
                reader, writer = await asyncio.open_connection("127.0.0.1", _PORT)
            if status == 200:
                found.append((time.perf_counter() - began) * 1000)
            else:
                errors += 1
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(connections)))
    return Measured(time.perf_counter() - began, sorted(found), errors)


def together(parts: list[Measured]) -> Measured:
    """Several stretches as one."""
    milliseconds = sorted(value for part in parts for value in part.milliseconds)
    return Measured(sum(part.seconds for part in parts), milliseconds, sum(part.errors for part in parts))


def _target(number: int) -> float:
    """Spread over [0.05, 0.9), each number another one (the golden ratio's multiples)."""
    return 0.05 + 0.85 * (number * 0.6180339887498949 % 1)


async def _one(path: str, target: float) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", _PORT)
    _, body = await _ask(reader, writer, path, target)
    writer.close()
    return body.decode()


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, target: float
) -> tuple[int, bytes]:
    body = json.dumps({"model": "tiny", "target": {"ratio": target}})
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").lower().split("\r\n")
    length = next((int(line.partition(":")[2]) for line in lines if line.startswith("content-length:")), None)
    if length is None:
        raise ValueError("an answer without Content-Length")
    return int(lines[0].split()[1]), await reader.readexactly(length)


if __name__ == "__main__":
    main()
