"""A ledger that lasts as long as a search whose evaluations nobody reads again."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lop.search.ledger import Ledger


@contextmanager
def temporary_ledger() -> Iterator[Ledger]:
    """An empty ledger in a folder that is removed."""
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger", {}) as ledger:
        yield ledger
