"""How long a stage takes, in the run's own record."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lop.run.run import Run


@contextmanager
def timed(run: Run, stage: str) -> Iterator[None]:
    """Adds the time that the block takes to what the stage has taken so far; that of a failure is not added."""
    start = time.perf_counter()
    try:
        yield
    except KeyboardInterrupt:
        run.add_seconds(stage, time.perf_counter() - start)
        raise
    # What fails leaves nothing behind, not even its time.
    run.add_seconds(stage, time.perf_counter() - start)
