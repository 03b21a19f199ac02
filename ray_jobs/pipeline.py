"""All stages on a cluster: `ray job submit --working-dir . -- python -m ray_jobs.pipeline --run DIR …`.

What is done already is not done again, so a pipeline that was interrupted is taken up by the same command.
"""

import logging
import sys
from collections.abc import Sequence

from lop.cli import main
from ray_jobs.job import run_with_model

log = logging.getLogger(__name__)


def run_pipeline(arguments: Sequence[str]) -> int:
    """Runs calibrate, search, train and compare, up to the first that fails, and returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for number, stage in enumerate(("calibrate", "search", "train", "compare"), start=1):
        log.info("%d/4 %s", number, stage)
        needs_model = stage in ("calibrate", "compare")
        code = run_with_model(stage, arguments) if needs_model else main([stage, *arguments])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(run_pipeline(sys.argv[1:]))
