"""LOP against what is read off statistics, on `smol`, with and without recovery: `python benchmarks/comparison.py`.

Every method at 10 to 60%, with `none`, `bias` and `refit`, on the same 800 test items (`benchmarks/bench.py`): images,
knowledge and prose. Without recovery LOP is the search that scores widths as they are; otherwise, and beside it, the
one that scores them refitted. Each score is a cell under `results/smol`, shared with `benchmarks/smol.py`; what is
missing is made, which takes hours on two cores. `--ratios`, `--recoveries` and `--methods` make a part; `--check N`
makes N cells of it again.

Asked for all ratios, methods and recoveries it writes `results/smol/comparison.json`, `.md` and `.png`, and lists every
cell in which LOP's search is not ahead by a 95% interval (paired bootstrap over images and texts). The last line is
JSON: `kl` by recovery, method and ratio, and `behind` by recovery and ratio.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench import LEARNT, LOP, PREDICTOR, UNREFITTED, Bench
from matplotlib import pyplot as plt
from smol import READ, RESULTS, parts

from lop.checkpoint.recoveries import Recovery
from lop.methods.method import Side
from lop.methods.registry import EVERY
from lop.report.intervals import Interval
from lop.report.plots import save_figure
from lop.storage.files import write_json

RECOVERIES = ("none", "bias", "refit")
METHODS = (*READ, LOP, PREDICTOR)
# What others are held against.
_OURS = {"none": UNREFITTED, "bias": LOP, "refit": LOP}
_TEXT = "The KL to the dense model in nats, and the questions answered right; `*`: LOP's search is not certainly ahead."


@dataclass(frozen=True)
class Cell:
    """A method at a ratio with a recovery.

    Attributes:
        kl: mean over items, and `kl_of` those about images, knowledge, and prose.
        right: share of questions.
        lead: of LOP's search: by how much its KL is less.
    """

    method: str
    ratio: float
    recovery: Recovery
    kl: Interval
    kl_of: Mapping[str, float]
    right: float
    lead: Interval

    @property
    def is_beaten(self) -> bool:
        """Whether LOP's search is certainly ahead of it."""
        return self.lead.low > 0


def compared(bench: Bench, methods: Sequence[str], ratios: Sequence[float], recovery: Recovery) -> list[Cell]:
    """The cells of a recovery."""
    kinds, cells = parts(bench.items), []
    for ratio in ratios:
        ours = bench.result(_OURS[recovery], ratio, recovery)[1]
        for method in dict.fromkeys([*methods, _OURS[recovery]]):
            _, kl, right = bench.result(method, ratio, recovery)
            shares = {kind: float(kl[mine].mean()) for kind, mine in kinds.items()}
            lead = bench.interval(kl - ours)
            cells.append(Cell(method, ratio, recovery, bench.interval(kl), shares, right, lead))
    return cells


def table(cells: Sequence[Cell], recovery: Recovery) -> str:
    """A recovery's cells in Markdown, a row for each method."""
    ratios = list(dict.fromkeys(cell.ratio for cell in cells))
    rows = [["method", *(f"{ratio:.0%}" for ratio in ratios)], ["---"] * (len(ratios) + 1)]
    for method in dict.fromkeys(cell.method for cell in cells):
        mine = [cell for cell in cells if (cell.method, cell.recovery) == (method, recovery)]
        if mine:
            rows.append([_label(method), *map(_told, mine)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _told(cell: Cell) -> str:
    kl = f"{cell.kl.value:.3f}"
    is_ours = cell.method == _OURS[cell.recovery]
    mark = "" if cell.is_beaten or is_ours else "*"
    return f"{f'**{kl}**' if is_ours else kl}{mark}, {cell.right:.1%}"


def plot(cells: Sequence[Cell], path: Path) -> None:
    """KL by ratio, a panel for each recovery and a line for each method, with 95% intervals."""
    recoveries = list(dict.fromkeys(cell.recovery for cell in cells))
    size = (4.6 * len(recoveries), 4.6)
    figure, panels = plt.subplots(1, len(recoveries), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axes, recovery in zip(panels[0], recoveries, strict=True):
        for number, method in enumerate(dict.fromkeys(cell.method for cell in cells)):
            if not (mine := [cell for cell in cells if (cell.method, cell.recovery) == (method, recovery)]):
                continue
            values = np.array([[cell.kl.value, cell.kl.low, cell.kl.high] for cell in mine])
            is_lop = _is_lop(method)
            axes.errorbar(
                [100 * cell.ratio for cell in mine],
                values[:, 0],
                np.abs(values[:, 1:].T - values[:, 0]),
                color=f"C{number}",
                marker="o" if is_lop else "s",
                linewidth=2.4 if is_lop else 1.2,
                linestyle="-" if is_lop else "--",
                capsize=3,
                label=_label(method),
            )
        axes.set(xlabel="FFN neurons removed (%)", yscale="log", title=f"recovery: {recovery}")
        axes.grid(alpha=0.3, which="both")
    panels[0][0].set(ylabel="KL to the dense model (nats)")
    panels[0][0].legend(fontsize=8)
    save_figure(figure, path)


def report(cells: Sequence[Cell], items: int) -> str:
    """All tables in Markdown, and what LOP is not ahead of."""
    title = f"# `smol`: every method with every recovery\n\n{_TEXT} {items} test items; `benchmarks/comparison.py`."
    tables = [f"## {recovery}\n\n{table(cells, recovery)}" for recovery in dict.fromkeys(c.recovery for c in cells)]
    level = [
        f"- {cell.recovery}, {cell.ratio:.0%}: {_label(cell.method)}, LOP's KL is less by {cell.lead.value:.3f} "
        f"({cell.lead.low:.3f} to {cell.lead.high:.3f})"
        for cell in cells
        if not (cell.is_beaten or _is_lop(cell.method))
    ]
    ours = {(cell.ratio, cell.recovery): cell for cell in cells if cell.method == _OURS[cell.recovery]}
    by_kind = [f"- {kind}: {', '.join(_as_good(cells, ours, kind)) or 'none'}" for kind in cells[0].kl_of]
    return "\n\n".join(
        [
            title,
            *tables,
            "## Where LOP's search is not certainly ahead\n\n" + ("\n".join(level) or "Nowhere."),
            "## What is not behind LOP's search on one kind of item\n\n" + "\n".join(by_kind) + "\n",
        ]
    )


def _as_good(cells: Sequence[Cell], ours: Mapping[tuple[float, Recovery], Cell], kind: str) -> list[str]:
    """Cells whose KL on a kind is not above that of LOP's search."""
    return [
        f"{_label(cell.method)} at {cell.ratio:.0%} ({cell.recovery})"
        for cell in cells
        if not _is_lop(cell.method) and cell.kl_of[kind] <= ours[cell.ratio, cell.recovery].kl_of[kind]
    ]


def _label(method: str) -> str:
    return "LOP search, unrefitted" if method == UNREFITTED else EVERY[method].label or method


def _is_lop(method: str) -> bool:
    return method == UNREFITTED or EVERY[method].side is Side.LOP


def summary(cells: Sequence[Cell]) -> dict[str, Any]:
    """The last line."""
    kl: dict[str, Any] = {}
    behind: dict[str, Any] = {}
    for cell in cells:
        kl.setdefault(cell.recovery, {}).setdefault(cell.method, {})[str(cell.ratio)] = cell.kl.value
        names = behind.setdefault(cell.recovery, {}).setdefault(str(cell.ratio), [])
        names += [cell.method] * (not (cell.is_beaten or _is_lop(cell.method)))
    return {"benchmark": "comparison", "kl": kl, "behind": behind}


def main() -> None:
    """Makes what is missing, writes the report, and prints."""
    parser = argparse.ArgumentParser(description="LOP against what is read off statistics, with every recovery.")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(LEARNT))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--recoveries", nargs="+", default=list(RECOVERIES), choices=RECOVERIES)
    parser.add_argument("--check", type=int, default=0, metavar="N", help="make N scores again")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/benchmark-smol"), help="where searches keep their ledgers"
    )
    options = parser.parse_args()
    bench = Bench("smol", options.runs, 0, [RESULTS])
    if options.check:
        agree = list(bench.check(options.check, options.methods, options.recoveries))
        print(json.dumps({"benchmark": "comparison", "checked": len(agree), "agree": sum(agree)}))
        return
    cells = [c for r in options.recoveries for c in compared(bench, options.methods, options.ratios, r)]
    text = report(cells, len(bench.items))
    print(text)
    if (options.ratios, options.methods, options.recoveries) == (list(LEARNT), list(METHODS), list(RECOVERIES)):
        (RESULTS / "comparison.md").write_text(text)
        write_json(RESULTS / "comparison.json", {"items": len(bench.items), "cells": [asdict(cell) for cell in cells]})
        plot(cells, RESULTS / "comparison.png")
    print(json.dumps(summary(cells)))


if __name__ == "__main__":
    main()
