"""The Ray cluster that a stage runs on: the one it was submitted to, or one on this machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from lop.errors import LopError


@contextmanager
def connected() -> Iterator[None]:
    """Connects to `RAY_ADDRESS` if it is set (as under `ray job submit`), else starts Ray on this machine.

    Does nothing where the process is connected already, and ends only what it began.

    Raises:
        LopError: the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise LopError(f"no Ray cluster at {address or 'this machine'}: {str(error).splitlines()[0]}") from None
    try:
        yield
    finally:
        ray.shutdown()
