"""How a command runs as a job: its driver holds nothing of the cluster, so that what it starts can have all of it."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

from lop.cli import COMPUTING, build_parser, exit_code, run_stages, set_up_logging
from lop.options import settle
from lop.terminal import prepare_streams
from ray_jobs.cluster import connected
from ray_jobs.pool import map_on_actors


def run_job(command: str) -> None:
    """Runs a command with this process's arguments, and ends the process with its exit code."""
    sys.exit(run_command([command, *sys.argv[1:]]))


def run_command(arguments: Sequence[str]) -> int:
    """Runs a command's stages one after the other, up to the first that fails, and returns the exit code.

    A stage that computes with the model itself runs on a worker with the config's `gpus_per_worker`, which the driver's
    machine may not have; the folder of the run must be shared, or a URI. It starts nothing there, as that might wait
    for ever for what the stage itself holds.
    """
    prepare_streams()
    options = build_parser().parse_args(arguments)
    stages = [argparse.Namespace(**{**vars(options), "stages": (stage,)}) for stage in options.stages]
    return exit_code(partial(_run_each, stages))


def _run_each(stages: Sequence[argparse.Namespace]) -> int:
    for stage in stages:
        config, elsewhere = settle(stage)
        if config.workers and config.gpus_per_worker and stage.stages[0] in COMPUTING:
            with connected(show_workers=True):
                list(map_on_actors(_worker, [elsewhere], config))
        else:
            run_stages(stage)
    return 0


def _worker() -> Callable[[argparse.Namespace], int]:
    set_up_logging()
    return run_stages
