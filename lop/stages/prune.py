"""From a target to a pruned checkpoint."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lop import __version__
from lop.checkpoint.bits import BITS, COMPENSATED, check_widths
from lop.checkpoint.compensation import compensate_checkpoint
from lop.checkpoint.edge.files import check_source
from lop.checkpoint.export import export
from lop.checkpoint.formats import FORMATS, Format
from lop.checkpoint.recoveries import RECOVERIES, Recovery, untrained
from lop.checkpoint.recovery import recover_checkpoint
from lop.errors import CancelledError
from lop.model.rounding import check_library
from lop.run.choice import Choice, choose, footprint_of, packing_of
from lop.run.config import Config
from lop.run.prediction import what_ships
from lop.run.run import Run
from lop.space.allocation import Allocation
from lop.space.size import Target
from lop.stages.calibrate import warn_of_samples
from lop.stages.distil import distil_stage
from lop.storage.destination import check_new
from lop.storage.location import Location

Progress = Callable[[str, int, int], None]


def prune_stage(
    run: Run | None,
    config: Config,
    target: Target,
    out: str | Path,
    *,
    format: Format = "hf",
    bits: int | None = None,
    vision: bool = False,
    on_choice: Callable[[Choice], None] = lambda choice: None,
    progress: Progress = lambda step, done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Predicts the target's allocation and writes the checkpoint; see `export_allocation`.

    Args:
        bits: of the weights; None lets a target in bytes choose, where `lop measure` has been run.
        on_choice: told what will be written, before it is.

    Raises:
        LopError: the target cannot be met, or something that the run needs is missing or damaged.
    """
    choice = choose(run, config, target, format, bits=bits, vision=vision)
    on_choice(choice)
    return export_allocation(
        run or what_ships(config),
        choice.allocation,
        out,
        target=choice.ratio,
        format=format,
        bits=choice.bits,
        vision=vision,
        progress=progress,
        cancelled=cancelled,
    )


def export_allocation(
    run: Run,
    allocation: Allocation,
    out: str | Path | Location,
    *,
    target: float,
    format: Format = "hf",
    importance: str | None = None,
    recovery: Recovery | None = None,
    bits: int = BITS[0],
    vision: bool = False,
    scratch: Path | None = None,
    progress: Progress = lambda step, done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Writes the checkpoint of an allocation in an importance's order; it appears whole or not at all.

    Recovery `refit` runs the calibration samples through the model twice, one layer in memory at a time; `none`, `bias`
    and the writing itself build no model. With `distil` what was refitted then learns from the dense model, whole in
    memory (`lop.stages.distil`), on the config's samples.

    Args:
        out: a new folder: a local path, a URI that pyarrow knows, such as `s3://bucket/folder`, or a location.
        target: the pruning ratio that was asked for; goes into the manifest.
        importance: in whose order neurons and groups are kept, for a method's own; None takes the config's.
        recovery: None takes the config's.
        bits: of the language backbone's weights: below 16 they are quantised, and below 8 layer by layer on the
            calibration samples, whatever the recovery (`lop.checkpoint.compensation`).
        vision: quantises the vision tower, too.
        scratch: where recovery keeps a folder while it runs; by default the system's place for temporary files.
        progress: called in this thread with the step (`"recover"`, counted in layers, `"quantise"`, in matrices, or
            `"export"`, in bytes; and those of `distil_stage`), how much of it is done, and how much it is in all.
        cancelled: asked after each layer, and about every 8 MiB, whether to give up.

    Returns:
        The checkpoint's manifest, as it stands in its `lop.json`.

    Raises:
        LopError: the format cannot hold what recovery adds, `out` is there already, or the run lacks something.
        CancelledError: `cancelled` said so.
        OSError: the disk is full or read-only. After any error nothing is left behind.
    """
    recovery = recovery or run.config.recovery
    ranked = importance or run.config.importance
    order, groups = run.order_by(ranked), run.groups_by(ranked)
    place, footprint = Location.parse(out), footprint_of(run, format, recovery, bits, vision=vision)
    packing = packing_of(run, bits, vision=vision)
    if packing is not None:
        check_library()
        check_widths(bits, allocation.widths[: len(order)])
    if kind := FORMATS[format].gguf:
        check_source(run.model_folder, kind)
    check_new(place, bytes=footprint.bytes(allocation.widths))
    if RECOVERIES[recovery].trains:
        with TemporaryDirectory(prefix="lop-untrained-", dir=scratch) as folder:
            start = Path(folder) / "checkpoint"
            export_allocation(
                run,
                allocation,
                start,
                target=target,
                format=format,
                recovery=untrained(recovery),
                scratch=scratch,
                progress=progress,
                cancelled=cancelled,
            )
            return distil_stage(run.config, start, place, progress=progress, cancelled=cancelled)
    torch.set_num_threads(run.config.threads)
    about = {
        "version": __version__,
        "source": run.config.model,
        "target": target,
        "importance": ranked,
        "recovery": recovery,
        "fingerprints": run.calibration_fingerprints,
    }

    def on_layer(done: int, total: int) -> None:
        if cancelled():
            raise CancelledError("the export was cancelled")
        progress("recover", done, total)

    is_compensated = packing is not None and bits < COMPENSATED
    if RECOVERIES[recovery].refits or is_compensated:
        warn_of_samples(run.config)
    inputs: dict[str, Any] = {
        "order": order,
        "means": run.statistics.mean,
        "samples": run.samples.calibration,
        "batch_tokens": run.config.batch_tokens,
        "images": run.config.images,
        "device": run.config.device,
        "dtype": run.config.dtype,
        "progress": on_layer,
    }
    with TemporaryDirectory(prefix="lop-recovery-", dir=scratch) as folder:
        recovered, packed = {}, {}
        if is_compensated:
            assert packing is not None
            packed = compensate_checkpoint(
                run.model_folder,
                allocation,
                recovery,
                packing,
                Path(folder),
                groups=groups,
                padded=FORMATS[format].is_padded,
                **inputs,
            )
        if not (is_compensated and RECOVERIES[recovery].refits):
            recovered = recover_checkpoint(
                run.model_folder, allocation, recovery, Path(folder), groups=groups, **inputs
            )
        return export(
            run.model_folder,
            place,
            allocation,
            order,
            about=about,
            groups=groups,
            format=format,
            recovered=recovered,
            packing=packing,
            packed=packed,
            scratch=scratch,
            progress=lambda done, total: progress("export", done, total),
            on_matrix=lambda done, total: progress("quantise", done, total),
            cancelled=cancelled,
        )
