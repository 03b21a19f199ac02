"""One checkpoint written for the service: the one place where it calls the exporter."""

from collections.abc import Callable
from pathlib import Path

from lop.allocation import Allocation
from lop.run import Run
from lop.stages import export_allocation

# What the exporter can write.
FORMATS = ("hf",)
RECOVERIES = ("none",)


def write_checkpoint(
    run: Run,
    allocation: Allocation,
    out: Path,
    *,
    format: str,
    recovery: str,
    on_progress: Callable[[int, int], None],
) -> None:
    """Exports; `on_progress` is told the bytes done and in all, and ends the export by raising.

    Raises:
        LopError: something that the run needs is missing or damaged.
        OSError: the disk is full.
    """
    assert format in FORMATS
    assert recovery in RECOVERIES
    target = run.space.ratio(allocation.budget)
    export_allocation(run, allocation, out, target=target, progress=False, on_progress=on_progress)


def companion_bytes(run: Run) -> int:
    """What a checkpoint takes on disk beside its tensors: tokenizer, configuration, headers and manifest."""
    beside = sum(file.stat().st_size for file in run.model_folder.iterdir() if file.suffix != ".safetensors")
    return beside + 2**18
