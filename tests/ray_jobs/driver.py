"""A search's driver to be killed: `python -m tests.ray_jobs.driver LEDGER LOG OUTCOME`; a ledger may be a URI."""

import sys
from functools import partial
from pathlib import Path

from lop.search.ledger import Ledger
from lop.search.loop import run_search
from ray_jobs.cluster import connected
from ray_jobs.fleet import Fleet
from tests.lop.search.test_loop import make_trees, outcome
from tests.ray_jobs.evaluators import Logged


def main(ledger: str, log: Path, result: Path) -> None:
    trees = make_trees()
    with connected(), Fleet(partial(Logged, log, 0.1), count=3) as fleet, Ledger(ledger, {}) as opened:
        run_search(trees.values(), fleet, opened)
    result.write_text(repr(outcome(trees)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
