"""`lop serve`: the application on this machine's Ray, until it is told to stop."""

import logging
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve import Application

from lop.errors import LopError, first_line
from lop.interrupt import Interrupted
from lop.run.config import load_config
from serve.guard import is_loopback
from serve.keys import VARIABLE, load_keys
from serve.settings import ModelSettings, ServiceSettings

log = logging.getLogger(__name__)


def service_settings(runs: Sequence[Path], overrides: Sequence[str], **values: Any) -> ServiceSettings:
    """Settings from the command line; a run is served under the last part of its model's name.

    Raises:
        LopError: a run has no readable config, two have one name, or a setting is unknown or wrong.
    """
    data: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    if runs:
        named = [(Path(load_config(run / "config.yaml").model).name, ModelSettings(run=run)) for run in runs]
        data["models"] = dict(named)
        if len(data["models"]) < len(named):
            raise LopError(f"two runs are of a model of one name: {', '.join(name for name, _ in named)}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise LopError(f"--set {override!r}: write key=value, for instance queue=100")
        try:
            data[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise LopError(f"--set {override!r}: {text!r} is not a YAML value") from None
    try:
        return ServiceSettings(**data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise LopError(f"setting {key}: {first['msg']}, not {first['input']!r}") from None


def check_address(settings: ServiceSettings, host: str, port: int) -> None:
    """Looks before anything is started.

    Raises:
        LopError: the address is not this machine's own and there are no keys, or it cannot be listened on.
    """
    if not load_keys(settings.keys_file) and not is_loopback(host):
        raise LopError(f"--host {host} without API keys: set {VARIABLE} or --keys, or listen on 127.0.0.1")
    if not 1 <= port <= 65535:
        raise LopError(f"port {port} is not from 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise LopError(f"{host}:{port} cannot be listened on: {error.strerror}") from None


def launch(application: Application, *, host: str, port: int) -> None:
    """Serves until SIGTERM, by which a service is stopped, or Ctrl-C. Ray must be connected.

    Raises:
        LopError: the cluster serves something already, or the application does not start.
        Interrupted: Ctrl-C; exports go on at the next start, as after SIGTERM.
    """
    if serve.status().proxies:
        raise LopError("this Ray cluster runs Serve already: use `serve deploy`, or another RAY_ADDRESS")
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application, name="lop", route_prefix="/")
        print(f"http://{host}:{port}/", flush=True)
        signal.pause()
    except Interrupted as interrupted:
        if interrupted.number != signal.SIGTERM:
            raise
        log.info("lop: stopped; exports go on at the next start")
    except RuntimeError as error:
        raise LopError(f"the service did not start: {first_line(error)} (see Ray's logs)") from None
    finally:
        serve.shutdown()
