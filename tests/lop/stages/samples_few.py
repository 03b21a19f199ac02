"""A folder of a few of the embedded samples."""

from pathlib import Path

import pyarrow.parquet as pq

from lop.model.find import assets


def few_samples(folder: Path, count: int = 16) -> Path:
    """Writes the first samples of each set, and returns the folder."""
    out = folder / "samples"
    out.mkdir()
    for name in ("calibration", "reward", "test"):
        table = pq.read_table(assets() / "samples" / f"{name}.parquet")
        pq.write_table(table.slice(0, count), out / f"{name}.parquet")
    return out
