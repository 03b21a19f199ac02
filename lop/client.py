"""A client of the service, by Python's own HTTP."""

import hashlib
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from lop.errors import LopError
from lop.storage.destination import check_new
from lop.storage.files import atomic_folder
from lop.storage.location import Location

_BLOCK = 2**20
_POLL_SECONDS = 0.3


class Client:
    """Asks a service for sizes and models.

    Args:
        url: where the service is, such as `http://127.0.0.1:8000`.
        key: an API key; by default `LOP_API_KEY` of the environment, if set.
        timeout: seconds that one answer may take.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 60) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise LopError(f"service {url!r} is not an http:// or https:// address")
        self._url, self._key, self._timeout = url.rstrip("/"), key or os.environ.get("LOP_API_KEY"), timeout

    def models(self) -> list[dict[str, Any]]:
        """The models on offer."""
        return list(self._json("GET", "/v1/models")["models"])

    def allocation(
        self, model: str, *, format: str = "hf", recovery: str | None = None, bits: int = 16, **target: float | str
    ) -> dict[str, Any]:
        """What each layer would keep for a target, and the accuracy to expect of it.

        Args:
            bits: of the weights; see `models` for those on offer.
            target: `ratio=`, `parameters=`, `bytes=`, `memory=` with `context=` (and `images=`, `batch=`, `pixels=`),
                or `latency=` in seconds with `device=` (and `phase=`).
        """
        asked = {"model": model, "target": target, "format": format, "recovery": recovery, "bits": bits}
        return self._json("POST", "/v1/allocations", asked)

    def make(
        self, model: str, *, format: str = "hf", recovery: str | None = None, bits: int = 16, **target: float | str
    ) -> dict[str, Any]:
        """Asks for a checkpoint and returns its state at once; asking again makes nothing twice."""
        asked = {"model": model, "target": target, "format": format, "recovery": recovery, "bits": bits}
        return self._json("POST", "/v1/checkpoints", asked)

    def state(self, id: str) -> dict[str, Any]:
        """A checkpoint's state."""
        return self._json("GET", f"/v1/checkpoints/{urllib.parse.quote(id, safe='')}")

    def remove(self, id: str) -> None:
        """Cancels or removes a checkpoint."""
        self._open("DELETE", f"/v1/checkpoints/{urllib.parse.quote(id, safe='')}").close()

    def get(
        self,
        model: str,
        *,
        out: str | Path,
        format: str = "hf",
        recovery: str | None = None,
        bits: int = 16,
        **target: float | str,
    ) -> Path:
        """Has a checkpoint made, waits for it, and downloads it into a new folder, which it returns.

        Raises:
            LopError: `out` cannot be made, the service refuses or cannot be reached, the export fails, or a file does
                not arrive as it was sent (SHA-256); nothing is left behind.
        """
        place = Location.parse(out)
        if not place.is_local:
            raise LopError(f"out={str(out)!r} is a URI: name a local folder")
        check_new(place)
        checkpoint = self.make(model, format=format, recovery=recovery, bits=bits, **target)
        while checkpoint["state"] in ("queued", "running"):
            time.sleep(_POLL_SECONDS)
            checkpoint = self.state(checkpoint["id"])
        if checkpoint["state"] != "complete":
            raise LopError(f"checkpoint {checkpoint['id']} {checkpoint['state']}: {checkpoint['error']}")
        check_new(place, bytes=sum(file["bytes"] for file in checkpoint["files"].values()))
        with atomic_folder(Path(place.path)) as folder:
            for name, file in checkpoint["files"].items():
                if Path(name).name != name:
                    raise LopError(f"the service sent {name!r} as the name of a file")
                self._download(file, folder / name)
        return Path(place.path)

    def _download(self, file: dict[str, Any], path: Path) -> None:
        """Takes a file, going on where a connection broke off as long as something arrives."""
        digest, arrived, more = hashlib.sha256(), 0, True
        with path.open("wb") as out:
            while more:
                # Should the file be another one by now, all of it comes, and its hash is not the expected one.
                rest = {"Range": f"bytes={arrived}-", "If-Range": f'"{file["sha256"]}"'} if arrived else {}
                begin = arrived
                with self._open("GET", file["url"], headers=rest) as answer:
                    for block in _blocks(answer):
                        digest.update(block)
                        out.write(block)
                        arrived += len(block)
                more = begin < arrived < file["bytes"]
        if digest.hexdigest() != file["sha256"]:
            raise LopError(f"{path.name} did not arrive as it was sent: try again")

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._open(method, path, body) as answer:
            value: dict[str, Any] = json.load(answer)
            return value

    def _open(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, headers: Mapping[str, str] | None = None
    ) -> Any:
        headers = dict(headers or {})
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=self._timeout)
        except urllib.error.HTTPError as error:
            with error:
                try:
                    detail = json.load(error)["detail"]
                except (ValueError, KeyError, TypeError):
                    detail = error.reason
            raise LopError(f"{method} {path}: {error.code}: {detail}") from None
        except OSError as error:
            raise LopError(f"service {self._url} cannot be reached: {getattr(error, 'reason', error)}") from None


def _blocks(answer: Any) -> Iterator[bytes]:
    # What breaks off is told by its hash.
    with suppress(ConnectionError, TimeoutError, HTTPException):
        while block := answer.read(_BLOCK):
            yield block
