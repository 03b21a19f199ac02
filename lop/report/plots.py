"""The report's pictures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from lop.methods.method import Side
from lop.methods.registry import EVERY
from lop.report.compare import Average
from lop.run.results import Found
from lop.storage.files import atomic_file


def plot_accuracy(averages: Sequence[Average], path: Path) -> None:
    """Accuracy by target, one line a method, with 95% intervals."""
    dense = next(average for average in averages if average.method == "dense")
    methods = list(dict.fromkeys(average.method for average in averages if average.method != "dense"))
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.axhline(100 * dense.accuracy.value, color="0.5", linestyle=":", label="dense")
    for index, method in enumerate(methods):
        mine = sorted((a for a in averages if a.method == method), key=lambda average: average.target)
        values = np.array([[a.accuracy.value, a.accuracy.low, a.accuracy.high] for a in mine]) * 100
        spread = np.abs(values[:, 1:].T - values[:, 0])
        is_lop = EVERY[method].side is Side.LOP
        axes.errorbar(
            # Side by side, so that the intervals can be told apart.
            [100 * a.target + 0.4 * (index - len(methods) / 2) for a in mine],
            values[:, 0],
            spread,
            marker="o" if is_lop else "s",
            linewidth=2.4 if is_lop else 1.2,
            linestyle="-" if is_lop else "--",
            capsize=3,
            label=EVERY[method].label or method,
        )
    axes.set(xlabel="FFN neurons removed (%)", ylabel="accuracy, mean over forms (%)")
    axes.set_title("Accuracy on the test samples")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_allocations(found: Sequence[Found], ratios: np.ndarray, path: Path, *, parts: int = 1) -> None:
    """Each target's best allocation as a row of a heat map, with one map for the FFNs and one for attention.

    Args:
        ratios: [targets, axes] pruning ratios.
        parts: that are open.
    """
    size = (7.5, (0.28 * len(found) + 1.8) * parts)
    figure, panels = plt.subplots(parts, 1, figsize=size, layout="constrained", squeeze=False)
    for axes, mine, units in zip(panels[:, 0], np.split(ratios, parts, axis=1), ("Neurons", "Groups of heads")):
        image = axes.imshow(100 * mine, aspect="auto", cmap="viridis", vmin=0, vmax=100)
        axes.set_yticks(range(len(found)), [f"{100 * result.target:g}" for result in found])
        axes.set_xticks(range(mine.shape[1]))
        axes.set(xlabel="layer", ylabel="target (%)")
        axes.set_title(f"{units} removed from each layer: the best allocations found")
        figure.colorbar(image, ax=axes, label="removed (%)")
    save_figure(figure, path)


def plot_search(found: Sequence[Found], reward: str, path: Path) -> None:
    """Best reward so far by evaluation, one line a target."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.92, len(found)))
    for result, colour in zip(found, colours):
        # The estimate of a race that was given up is no reward.
        measured = [e.worth(reward) if e.is_complete else -np.inf for _, e in result.evaluations]
        best = np.maximum.accumulate(measured)
        axes.plot(range(1, len(best) + 1), best, color=colour, label=f"{100 * result.target:g}%")
    axes.set(xlabel="evaluations", ylabel=f"best {reward.replace('_', ' ')} on the reward samples")
    if reward != "accuracy":
        axes.set_yscale("symlog", linthresh=0.01)  # Nats: of easy targets few hundredths, of hard ones many tenths.
    axes.set_title("Search: best allocation so far, by target")
    figure.legend(loc="outside right upper", fontsize=7, title="target")
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_trees(found: Sequence[Found], path: Path) -> None:
    """Each target's tree: how many nodes it has at each depth, and how many visits they have together."""
    depths = max(len(result.depths) for result in found)
    figure, panels = plt.subplots(1, 2, figsize=(9, 0.28 * len(found) + 1.8), sharey=True, layout="constrained")
    for axes, name in zip(panels, ("nodes", "visits")):
        counts = np.zeros((len(found), depths))
        for row, result in enumerate(found):
            counts[row, : len(result.depths)] = [getattr(depth, name) for depth in result.depths]
        image = axes.imshow(np.ma.masked_equal(counts, 0), aspect="auto", cmap="viridis", norm="log")
        axes.set_xticks(range(depths))
        axes.set(xlabel="depth", title=f"{name} by depth")
        figure.colorbar(image, ax=axes)
    panels[0].set_yticks(range(len(found)), [f"{100 * result.target:g}" for result in found])
    panels[0].set(ylabel="target (%)")
    save_figure(figure, path)


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Writes a figure as PNG, cropped to what is drawn, and closes it."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
