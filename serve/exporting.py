"""One checkpoint written for the service: the one place where it calls the exporter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lop.checkpoint.formats import FORMATS
from lop.checkpoint.recoveries import UNTRAINED
from lop.run.run import Run
from lop.space.allocation import Allocation
from lop.stages.prune import export_allocation

_HEADERS = 2**20
# Training would hold up everybody's exports for hours.
RECOVERIES = UNTRAINED
__all__ = ["FORMATS", "RECOVERIES", "companion_bytes", "write_checkpoint"]


def write_checkpoint(
    run: Run,
    allocation: Allocation,
    out: Path,
    *,
    format: str,
    recovery: str,
    scratch: Path,
    on_progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Exports, and returns the manifest.

    Args:
        scratch: a folder for recovery's files, which whoever calls cleans up should this process die.
        on_progress: told the step (`recover`, in layers, or `export`, in bytes), how much of it is done and how much it
            is in all; ends the export by raising.

    Raises:
        LopError: something that the run needs is missing or damaged.
        OSError: the disk is full.
    """
    return export_allocation(
        run,
        allocation,
        out,
        target=run.space.ratio(allocation.budget),
        format=format,
        recovery=recovery,
        scratch=scratch,
        progress=on_progress,
    )


def companion_bytes(run: Run) -> int:
    """What a checkpoint takes on disk beside its tensors: tokenizer, configuration, headers and manifest."""
    beside = sum(file.stat().st_size for file in run.model_folder.iterdir() if file.suffix != ".safetensors")
    return beside + _HEADERS
