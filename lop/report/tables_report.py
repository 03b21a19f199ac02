"""What people read of `lop.report.tables`: Markdown, JSON and pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from lop.methods.method import Side
from lop.methods.registry import EVERY, IN_REPORT, METHODS
from lop.report.board import Value
from lop.report.cells import recovered_in_words
from lop.report.intervals import Interval
from lop.report.needs import needs_in_words, without_checkpoint
from lop.report.plots import save_figure
from lop.report.speed import Speed
from lop.report.tables import Model, Tables
from lop.run.run import Run
from lop.space.size import ModelSize
from lop.storage.files import atomic_file, write_json

_NAMES = {
    "mmbench": "MMBench-like",
    "mme_perception": "MME-like perception",
    "mme_reasoning": "MME-like reasoning",
    "mmmu": "MMMU-like",
    "pope": "POPE-like",
    "average": "average",
}
_RADAR_METHODS = sorted(IN_REPORT, key=lambda name: METHODS[name].side is not Side.LOP)
_RADAR_TARGETS = (0.2, 0.3, 0.5, 0.6)
_GRID = 100
Row = list[str]


def report_tables(run: Run, tables: Tables) -> Path:
    """Writes `tables.md`, `tables.json` and a picture of each table and figure into the run's folder."""
    write_json(run.folder / "tables.json", tables.as_dict())
    columns = list(dict.fromkeys(value.column for value in tables.values))
    pictures = {
        "table1": _table1(tables, columns),
        "table2": _table2(tables.models, columns),
        "table3": _table3(tables, columns),
    }
    for name, (header, rows) in pictures.items():
        _draw_table(header, rows, run.folder / f"{name}.png")
    _draw_radar(tables.values, columns[:-1], run.folder / "figure1.png")
    _draw_allocations(tables, run.folder / "figure4.png")
    _draw_curves(tables, run.folder / "rivals.png")
    path = run.folder / "tables.md"
    with atomic_file(path) as temporary:
        temporary.write_text(_markdown(run, tables, pictures), encoding="utf-8")
    return path


def _markdown(run: Run, tables: Tables, pictures: dict[str, tuple[Row, list[Row]]]) -> str:
    counts = ", ".join(f"{task} {count:,}" for task, count in tables.counts.items())
    seeds = ", ".join(map(str, tables.seeds))
    parts = [
        f"# LOP and its rivals on `{run.config.model}`",
        f"The embedded benchmark: {counts} questions, on images of the test samples alone. Calibration, reward and "
        "test share no image; the paper searches on MMBench and reports MMBench, so its own figures there are not of "
        f"unseen questions. Seeds of searches and trainings: {seeds}.",
        "## Table 1: methods by pruning ratio",
        f"Every method {recovered_in_words(run)}. "
        "In each benchmark's own unit (MME: points of accuracy + accuracy+, others: percent), with the drop against "
        "the dense model in brackets; the average is over the columns, each in percent of its maximum, with the 95% "
        "interval of a bootstrap over images. **Bold**: significantly better (p < 0.05, paired bootstrap over images) "
        "than the best method of the other side, LOP's two against all baselines. Speed-up: against FLAP, as "
        "the paper counts / "
        "with everything cached for everyone.",
        _text(*pictures["table1"]),
        "### Where LOP is not significantly ahead",
        _behind(tables.values),
        "### LOP against each baseline",
        "Difference of the averages in points, with its paired 95% interval; p-values of the paired bootstrap, and of "
        "McNemar's exact test on all questions of the first seed.",
        _tests_table(tables),
        "## Figure 1: all benchmarks at a glance",
        "![Radar](figure1.png)",
        "## Table 2: pruned models and others of their size",
        _text(*pictures["table2"]),
        "## Table 3: predictor architectures",
        "The average on the benchmark in percent, mean over seeds, by pruning ratio.",
        _text(*pictures["table3"]),
        "## Figure 4: allocations by layer",
        "![Allocations](figure4.png)",
        "## Searches compared",
        "Best reward so far on the reward samples, by evaluations spent (in units of all reward samples); mean over "
        "targets, with the 95% interval over seeds. The sensitivity programme is a point: its scan serves all targets. "
        "A tree that has it as a root begins with its target's share of the scan.",
        "![Best reward by evaluations](rivals.png)",
        "## Needs and seconds",
        "Medians over targets and seeds. *Paper*: FLAP's calibrate + allocate + sort + prune over the method's own; "
        "of LOP only allocate + prune, for its statistics, order and predictor are there when a target is asked for. "
        "*Cached*: allocate + prune for everyone. LOP's search and training are in the run's `report.md`, once for all "
        "targets.",
        _text(*_seconds_table(tables.seconds, run.size)),
        *without_checkpoint(speed.method for speed in tables.seconds),
    ]
    return "\n\n".join(parts) + "\n"


def _table1(tables: Tables, columns: Sequence[str]) -> tuple[Row, list[Row]]:
    speeds = {speed.method: speed for speed in tables.seconds}
    header = ["pruned", "method", *(_NAMES[column] for column in columns), "speed-up"]
    rows = []
    cells = {(value.target, value.method, value.column): value for value in tables.values}
    for target, method in dict.fromkeys((v.target, v.method) for v in _shown(tables.values)):
        mine = speeds.get(method)
        speed = f"{_ratio(mine.paper)} / {_ratio(mine.cached)}" if mine else ""
        rows.append([f"{target:.0%}", method, *(_cell(cells[target, method, column]) for column in columns), speed])
    return header, rows


def _shown(values: Iterable[Value]) -> list[Value]:
    return sorted((value for value in values if value.side is not Side.ARCHITECTURE), key=lambda value: value.target)


def _cell(value: Value) -> str:
    number = f"{value.metric:.1f}"
    if value.column == "average":
        number += f" ±{50 * (value.share.high - value.share.low):.1f}"
    text = number if value.side is Side.DENSE else f"{number} ({-value.drop:+.1f})"
    return f"**{text}**" if value.bold else text


def _behind(values: Sequence[Value]) -> str:
    rows = [
        [
            f"{value.target:.0%}",
            value.method,
            _NAMES[value.column],
            value.rival,
            _points(value.lead),
            f"{value.p:.3f}",
        ]
        for value in _shown(values)
        if value.side is Side.LOP and not value.bold
    ]
    if not rows:
        return "Nowhere."
    return _text(["pruned", "method", "benchmark", "best baseline", "lead (points of 100)", "p"], rows)


def _tests_table(tables: Tables) -> str:
    rows = [
        [
            f"{test.target:.0%}",
            test.method,
            test.baseline,
            _points(test.difference),
            f"{test.bootstrap_p:.4f}",
            f"{test.mcnemar_p:.2g}",
        ]
        for test in tables.tests
    ]
    return _text(["pruned", "method", "against", "difference", "bootstrap p", "McNemar p"], rows)


def _points(value: Interval) -> str:
    return f"{100 * value.value:+.2f} ({100 * value.low:+.2f} to {100 * value.high:+.2f})"


def _table2(models: Sequence[Model], columns: Sequence[str]) -> tuple[Row, list[Row]]:
    rows = [
        [model.name, f"{model.parameters:,}", *(f"{model.metrics[column]:.1f}" for column in columns)]
        for model in sorted(models, key=lambda model: -model.parameters)
    ]
    return ["model", "parameters", *(_NAMES[column] for column in columns)], rows


def _table3(tables: Tables, columns: Sequence[str]) -> tuple[Row, list[Row]]:
    values = {
        (value.method, value.target): value
        for value in tables.values
        if value.side is Side.ARCHITECTURE and value.column == columns[-1]
    }
    targets = sorted({target for _, target in values})
    rows = []
    for method in dict.fromkeys(method for method, _ in values):
        name = method.removeprefix("predictor ")
        mine = [record for record in tables.predictors if record["architecture"] == name]
        error = np.mean([record["validation_error"] for record in mine]) if mine else float("nan")
        rows.append([name, f"{error:.5f}", *(_with_seeds(values[method, target]) for target in targets)])
    return ["architecture", "validation MSE", *(f"{target:.0%}" for target in targets)], rows


def _with_seeds(value: Value) -> str:
    text = f"{100 * value.share.value:.1f}"
    return f"{text} ±{100 * np.std(value.seeds, ddof=1):.1f}" if len(value.seeds) > 1 else text


def _seconds_table(speeds: Sequence[Speed], size: ModelSize) -> tuple[Row, list[Row]]:
    rows = []
    for speed in speeds:
        own = speed.seconds
        parts = [f"{value:.2g}" for value in (own.calibrate, own.allocate, own.sort, own.prune)]
        rows.append(
            [
                speed.method,
                needs_in_words(EVERY[speed.method].needs, size),
                *parts,
                _ratio(speed.paper),
                _ratio(speed.cached),
            ]
        )
    return ["method", "needs", "calibrate", "allocate", "sort", "prune", "speed-up (paper)", "speed-up (cached)"], rows


def _ratio(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3g}×"


def _text(header: Row, rows: Sequence[Row]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def _draw_table(header: Row, rows: Sequence[Row], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(1.6 * len(header), 0.28 * (len(rows) + 1)))
    axes.axis("off")
    plain = [[cell.strip("*") for cell in row] for row in rows] or [[""] * len(header)]
    drawn = axes.table(cellText=plain, colLabels=header, bbox=(0, 0, 1, 1), cellLoc="left")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    drawn.auto_set_column_width(list(range(len(header))))
    for (row, column), cell in drawn.get_celld().items():
        cell.set_linewidth(0.3)
        if row == 0 or (rows and rows[row - 1][column].startswith("**")):
            cell.set_text_props(weight="bold")
    save_figure(figure, path)


def _draw_radar(values: Sequence[Value], columns: Sequence[str], path: Path) -> None:
    targets = [t for t in _RADAR_TARGETS if any(v.target == t for v in values)] or sorted({v.target for v in values})[
        1:
    ]
    angles = np.linspace(0, 2 * np.pi, len(columns), endpoint=False)
    shares = {(v.method, v.target, v.column): 100 * v.share.value for v in values}
    figure, grid = plt.subplots(
        1,
        len(targets),
        figsize=(4.6 * len(targets), 5),
        subplot_kw={"polar": True},
        squeeze=False,
        layout="constrained",
    )
    for axes, target in zip(grid[0], targets):
        lines = {method: [shares.get((method, target, c), np.nan) for c in columns] for method in _RADAR_METHODS}
        for method, line in lines.items():
            style = {"linewidth": 2 if METHODS[method].side is Side.LOP else 1.2}
            axes.plot([*angles, angles[0]], [*line, line[0]], label=method, **style)
        dense = [shares["dense", 0.0, column] for column in columns]
        axes.plot([*angles, angles[0]], [*dense, dense[0]], label="dense", color="0.6", linestyle=":", linewidth=1.2)
        axes.set_xticks(angles, [_NAMES[column].replace(" ", "\n") for column in columns], fontsize=8)
        axes.set_theta_offset(np.pi / 2)  # The first column on top, where its name has room.
        axes.tick_params(axis="x", pad=10)
        axes.set_ylim(0, 100)
        axes.set_title(f"{target:.0%} pruned")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=9)
    save_figure(figure, path)


def _draw_allocations(tables: Tables, path: Path) -> None:
    records = [record for record in tables.allocations if METHODS[record["method"]].has_profile]
    targets = sorted({record["target"] for record in records})
    figure, grid = plt.subplots(
        len(targets), 1, figsize=(7.5, 2.1 * len(targets) + 0.6), sharex=True, squeeze=False, layout="constrained"
    )
    for axes, target in zip(grid[:, 0], targets):
        for record in records:
            if record["target"] == target:
                ratios = 100 * np.array(record["ratios"])
                is_lop = METHODS[record["method"]].side is Side.LOP
                axes.plot(
                    ratios, label=record["method"], linewidth=2.2 if is_lop else 1, marker="o" if is_lop else None
                )
        axes.axhline(100 * target, color="0.7", linestyle=":")
        axes.set(ylabel=f"{target:.0%}", ylim=(-3, 100))
    grid[-1, 0].set_xlabel("layer")
    grid[0, 0].legend(fontsize=7, ncols=4)
    figure.suptitle("Neurons removed from each layer (%)")
    save_figure(figure, path)


def _draw_curves(tables: Tables, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    common = set.intersection(
        *({c.target for c in tables.curves if c.rival == r} for r in {c.rival for c in tables.curves})
    )
    for method in METHODS.values():
        mine = [curve for curve in tables.curves if curve.rival == method.name and curve.target in common]
        if not mine:
            continue
        seeds = sorted({curve.seed for curve in mine})
        if method.search and method.search.is_shared:  # All that it spends, it spends at once.
            reward = np.mean([curve.reward for curve in mine])
            axes.plot(mine[0].curve[-1][0], reward, "D", label=method.in_curves)
            continue
        last = max(curve.curve[-1][0] for curve in mine)
        grid = np.linspace(1, last, _GRID)
        by_seed = np.array(
            [np.mean([_at(curve.curve, grid) for curve in mine if curve.seed == seed], axis=0) for seed in seeds]
        )
        (line,) = axes.plot(grid, by_seed.mean(0), label=method.in_curves)
        if len(seeds) > 1:
            half = 1.96 * by_seed.std(0, ddof=1) / np.sqrt(len(seeds))
            axes.fill_between(grid, by_seed.mean(0) - half, by_seed.mean(0) + half, alpha=0.2, color=line.get_color())
    axes.set(xlabel="evaluations of all reward samples", ylabel="best reward so far, mean over targets")
    axes.set_title("The same evaluations, spent by different searches")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def _at(curve: Sequence[tuple[float, float]], grid: np.ndarray) -> np.ndarray:
    """The best reward at each number of evaluations: the last one reached by then."""
    spent, reward = np.array(curve).T
    return np.asarray(reward[np.maximum(np.searchsorted(spent, grid, side="right") - 1, 0)])
