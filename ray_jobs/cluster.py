"""The Ray cluster that a stage runs on: the one it was submitted to, or one on this machine."""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError
from ray.job_config import JobConfig

from lop.errors import LopError, first_line
from lop.interrupt import Interrupted
from lop.storage.lock import locked

_SECONDS_TO_CONNECT = 10


class _SameImports(JobConfig):
    """Workers import from where this process does.

    Ray puts the driver's working directory first in their search path, unless they have one of their own. With it a
    `serve.py` or `lop.py` that lies there would be taken for LOP's, though this process never sees it.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        imports_from_here = os.getcwd() in map(os.path.realpath, sys.path)
        return not imports_from_here or super()._runtime_env_has_working_dir()


def ensure_ray(*, show_workers: bool = False) -> bool:
    """Connects to `RAY_ADDRESS` if it is set (as under `ray job submit`), else starts Ray on this machine.

    Ray's own default for a new cluster is to ask for a token, which it keeps in `~/.ray/auth_token`; setting
    `RAY_AUTH_MODE` overrides that.

    Args:
        show_workers: prints what other processes print.

    Returns:
        Whether this call connected; False where the process was connected already.

    Raises:
        LopError: the cluster cannot be reached, or cannot be started.
    """
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    try:
        with _signals_kept():
            if address:
                _check_listening(address)
                _init(address, show_workers)
            else:
                _start(show_workers)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        remedy = "check or unset RAY_ADDRESS" if address else "Ray could not start"
        raise LopError(f"no Ray cluster at {address or 'this machine'}: {first_line(error)} ({remedy})") from None
    return True


@contextmanager
def connected(*, show_workers: bool = False) -> Iterator[None]:
    """A cluster, by `ensure_ray`, inside the block; ends only what it began.

    Raises:
        LopError: the cluster cannot be reached, or cannot be started.
    """
    began = ensure_ray(show_workers=show_workers)
    try:
        yield
    finally:
        if began:
            ray.shutdown()


def _start(show_workers: bool) -> None:
    """A new cluster on this machine, one at a time.

    Ray looks for free ports and takes them later: of two clusters that start at once, one may meet the other's.
    """
    with locked(Path(tempfile.gettempdir()) / f"lop-ray-{os.getuid()}.lock"):
        # Without an address Ray would join whatever cluster was last started on this machine.
        _init("local", show_workers, include_dashboard=False)


def _init(address: str, show_workers: bool, **options: bool) -> None:
    ray.init(
        address=address,
        job_config=_SameImports(),
        log_to_driver=show_workers,
        logging_level=logging.ERROR,
        **options,
    )


@contextmanager
def _signals_kept() -> Iterator[None]:
    """SIGTERM does after the block what it did before: `ray.init` has it end the process, with a stack of C++.

    Raises:
        Interrupted: it came inside the block.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield
        return
    try:
        yield
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        raise Interrupted(signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, handler)


def _check_listening(address: str) -> None:
    """Fails within seconds where nothing answers; Ray itself would try again for many minutes.

    Raises:
        OSError, ValueError: nothing listens at the address, or it is not one.
    """
    if address in ("auto", "local"):
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname is None or parts.port is None:
        raise ValueError("an address is HOST:PORT")
    socket.create_connection((parts.hostname, parts.port), _SECONDS_TO_CONNECT).close()
