"""What `lop watch` and `lop ledger` show of a search that runs or has ended."""

import json
import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lop.console import PlainConsole
from lop.errors import LopError
from lop.search.ledger import evaluations, ledger_header
from lop.search.progress import STATUS_FILE, Progress
from lop.space.allocation import parse_shape
from lop.storage.location import Location
from lop.terminal import duration

_BARS = "▁▂▃▄▅▆▇█"
_SECONDS_BETWEEN_LOOKS = 2.0
_SECONDS_OF_SILENCE = 60.0


def read_status(location: Location) -> Progress:
    """The progress that a search last wrote.

    Raises:
        LopError: there is none, or it is damaged.
    """
    try:
        return Progress.from_dict(json.loads(location.read(STATUS_FILE)))
    except FileNotFoundError:
        raise LopError(f"{location}/{STATUS_FILE} is missing: no search has begun there") from None
    except (ValueError, KeyError, TypeError):
        raise LopError(f"{location}/{STATUS_FILE} is damaged: it is written anew while a search runs") from None


def watch(location: Location, *, once: bool = False) -> None:
    """Shows a search until it ends or Ctrl-C; once where asked to, or where nobody sits at a terminal.

    Raises:
        LopError: no search has begun there.
    """
    console = PlainConsole()
    progress = read_status(location)
    if once or not console.is_terminal:
        console.print(render(progress, str(location), now=time.time()))
        return
    with Live(console=console, refresh_per_second=2) as live:
        while True:
            live.update(render(progress, str(location), now=time.time()))
            if progress.done >= progress.planned:
                return
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            progress = read_status(location)


def render(progress: Progress, name: str, *, now: float) -> RenderableType:
    """One picture of a search: a line of numbers over a table of targets."""
    table = Table(box=None, pad_edge=False)
    reward = progress.reward.replace("_", " ")
    for heading in ("target", "evaluations", f"best {reward}"):
        table.add_column(heading, justify="right")
    table.add_column("neurons kept by layer, of the best", no_wrap=True)
    for target in progress.targets:
        table.add_row(
            f"{100 * target.target:g}%",
            f"{target.done}/{target.planned}",
            "" if target.best is None else f"{target.best:.4f}",
            sparkline([1 - ratio for ratio in target.ratios]),
        )
    return Group(Text(name, style="bold"), Text(_headline(progress, now)), table)


def _headline(progress: Progress, now: float) -> str:
    done = f"{progress.done} of {progress.planned} evaluations"
    if progress.done >= progress.planned:
        return f"{done}, finished"
    numbers = f"{done}, {progress.per_second:.3g} per second, {duration(progress.seconds_left)} left"
    silence = now - progress.time
    if silence > _SECONDS_OF_SILENCE:
        return f"{numbers}; not heard of for {duration(silence)}: run `lop search` again if it has ended"
    return f"{numbers}, {progress.workers} workers"


def sparkline(shares: Sequence[float]) -> str:
    """One character a share in [0, 1]."""
    return "".join(_BARS[min(int(share * len(_BARS)), len(_BARS) - 1)] for share in shares)


def print_ledger(location: Location, *, as_json: bool = False) -> None:
    """Prints all evaluations, in the order in which they were recorded: a table, or one JSON object a line.

    Raises:
        LopError: there is no ledger, or it is damaged.
    """
    rows = evaluations(location)
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    dense, costs = parse_shape(ledger_header(location)["shape"])
    whole = sum(width * cost for width, cost in zip(dense, costs))
    print(f"{'number':>6}  {'ratio':>7}  {'accuracy':>8}  {'log-prob':>9}  neurons kept by layer")
    for number, row in enumerate(rows, start=1):
        ratio = 1 - sum(width * cost for width, cost in zip(row["widths"], costs, strict=True)) / whole
        bars = sparkline([width / most for width, most in zip(row["widths"], dense, strict=True)])
        numbers = f"{number:>6}  {ratio:>7.2%}  {row['accuracy']:>8.4f}  {row['log_probability']:>9.4f}"
        note = f"failed: {row['error']}" if row["error"] else "" if row["complete"] else "given up: estimated"
        print(f"{numbers}  {bars}  {note}".rstrip())
