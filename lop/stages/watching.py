"""A search's progress: as a bar on a terminal and as lines in a log, in the run's folder, and where else it goes."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from lop.run.run import Run
from lop.search.progress import SearchProgress, Sink, bar_sink, log_sink, status_sink
from lop.search.tree import SearchTree

_SECONDS_BETWEEN_BARS = 0.2
_SECONDS_BETWEEN_STATUS = 2.0
_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def watched(
    run: Run, trees: Mapping[float, SearchTree], others: Sequence[Sink], *, shown: bool
) -> Iterator[SearchProgress]:
    """What to tell of trees by target, inside the block.

    Args:
        others: sinks beside the run's.
        shown: on the terminal or in the log, too.
    """
    sinks: list[tuple[float, Sink]] = [(_SECONDS_BETWEEN_STATUS, sink) for sink in (status_sink(run.location), *others)]
    is_terminal = shown and sys.stderr.isatty()
    with tqdm(desc="search", unit="evaluation", disable=not is_terminal, smoothing=0.05) as bar:
        if is_terminal:
            sinks.append((_SECONDS_BETWEEN_BARS, bar_sink(bar)))
        elif shown:
            sinks.append((_SECONDS_BETWEEN_LINES, log_sink))
        yield SearchProgress(trees, run.space, run.config.search.reward, sinks)
