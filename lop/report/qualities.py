"""What `lop measure` found, as a table and as a picture: quality by bytes of pruning alone, bits alone and both."""

from pathlib import Path

from matplotlib import pyplot as plt
from rich.table import Table

from lop.report.plots import save_figure
from lop.run.qualities import Qualities


def qualities_table(qualities: Qualities) -> Table:
    """One row a ratio, for each number of bits the KL to the dense model and the bytes."""
    table = Table(title=f"KL to the dense model, nats, on {qualities.samples} reward samples; bytes")
    table.add_column("pruned", justify="right")
    for bits in qualities.bits:
        table.add_column(f"{bits} bits", justify="right")
    measured = {(quality.ratio, quality.bits): quality for quality in qualities.measured}
    for ratio in sorted({ratio for ratio, _ in measured}):
        row = [measured.get((ratio, bits)) for bits in qualities.bits]
        table.add_row(f"{ratio:.1%}", *("" if q is None else f"{q.divergence:.4f}  {q.bytes:,}" for q in row))
    return table


def plot_qualities(qualities: Qualities, path: Path) -> None:
    """KL by bytes, one line for each number of bits, which starts at the model that is not pruned."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for bits in qualities.bits:
        mine = sorted((q for q in qualities.measured if q.bits == bits), key=lambda quality: quality.ratio)
        sizes, values = [q.bytes / 1e6 for q in mine], [max(q.divergence, 0) for q in mine]
        both = "pruning alone" if bits == max(qualities.bits) else f"pruned and {bits} bits"
        (line,) = axes.plot(sizes, values, marker="o", label=both)
        if mine[0].ratio == 0 and bits != max(qualities.bits):
            axes.plot(
                sizes[:1], values[:1], marker="s", markersize=9, color=line.get_color(), label=f"{bits} bits alone"
            )
    axes.set(xlabel="tensors (MB)", ylabel="KL to the dense model (nats)")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_title("Quality by bytes")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, path)
