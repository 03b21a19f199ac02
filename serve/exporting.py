"""One checkpoint written for the service: the one place where it calls the exporter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lop.checkpoint.bits import BITS, QUANTISED, Weight
from lop.checkpoint.formats import FORMATS
from lop.checkpoint.recoveries import UNTRAINED
from lop.errors import LopError
from lop.model.rounding import check_library
from lop.run.choice import footprint_of
from lop.run.run import Run
from lop.space.allocation import Allocation
from lop.stages.prune import export_allocation

_HEADERS = 2**20
# Training would hold up everybody's exports for hours.
RECOVERIES = UNTRAINED
__all__ = ["BITS", "FORMATS", "RECOVERIES", "companion_bytes", "quantised_weights", "write_checkpoint"]


def write_checkpoint(
    run: Run,
    allocation: Allocation,
    out: Path,
    *,
    format: str,
    recovery: str,
    bits: int,
    scratch: Path,
    on_progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Exports, and returns the manifest.

    Args:
        scratch: a folder for recovery's files, which whoever calls cleans up should this process die.
        on_progress: told the step (`recover`, in layers, `quantise`, in matrices, or `export`, in bytes), how much of
            it is done and how much it is in all; ends the export by raising.

    Raises:
        LopError: something that the run needs is missing or damaged.
        OSError: the disk is full.
    """
    return export_allocation(
        run,
        allocation,
        out,
        target=run.space.ratio_of(allocation.widths),
        format=format,
        recovery=recovery,
        bits=bits,
        scratch=scratch,
        progress=on_progress,
    )


def quantised_weights(run: Run) -> dict[int, Weight]:
    """What the dense model comes to with fewer bits, as far as it can have them; none where the library is missing."""
    try:
        check_library()
        found = {bits: footprint_of(run, "hf", "none", bits).quantised for bits in QUANTISED}
    except LopError:
        return {}
    return {bits: weight for bits, weight in found.items() if weight is not None}


def companion_bytes(run: Run) -> int:
    """What a checkpoint takes on disk beside its tensors: tokenizer, configuration, headers and manifest."""
    beside = sum(file.stat().st_size for file in run.model_folder.iterdir() if file.suffix != ".safetensors")
    return beside + _HEADERS
