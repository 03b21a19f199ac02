"""How a stage runs as a job: where its driver is, or, if it computes with the model itself, on a worker with a GPU."""

import sys
from collections.abc import Sequence

import ray

from lop.cli import main, settle
from lop.errors import LopError
from ray_jobs.cluster import connected

_ATTEMPTS = 3


def run_on_driver(stage: str) -> None:
    """Runs a stage with this process's arguments, and ends the process with its exit code."""
    sys.exit(main([stage, *sys.argv[1:]]))


def run_on_worker(stage: str) -> None:
    """The same for a stage that needs a GPU which the driver's machine may not have."""
    sys.exit(run_with_model(stage, sys.argv[1:]))


def run_with_model(stage: str, arguments: Sequence[str]) -> int:
    """Runs a stage where the config's `gpus_per_worker` are; the folder of the run must be shared, or a URI.

    Returns:
        The exit code.
    """
    try:
        config, command = settle([stage, *arguments])
        gpus = config.gpus_per_worker
        if not gpus:
            return main([stage, *arguments])
        with connected(show_workers=True):
            # A machine that is taken away is no fault of the stage's; what the stage raises comes as its exit code.
            task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_ATTEMPTS)(main)
            code: int = ray.get(task.remote(command))
            return code
    except LopError as error:
        print(f"lop: {error}", file=sys.stderr)
        return 2
