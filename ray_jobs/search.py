"""The search stage on a cluster: `ray job submit --working-dir . -- python -m ray_jobs.search --run DIR …`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lop.cli import main
from lop.config import Config
from lop.stages import build_evaluator
from ray_jobs.cluster import connected
from ray_jobs.fleet import Fleet


@contextmanager
def evaluator_fleet(config: Config, folder: Path) -> Iterator[Fleet]:
    """The config's number of actors, each with the run's model and reward samples."""
    build = partial(build_evaluator, config, folder.resolve())
    with connected(), Fleet(build, count=config.workers, gpus=config.gpus_per_worker) as fleet:
        yield fleet


if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
