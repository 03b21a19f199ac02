"""`lop quantise`: a checkpoint that is there, dense or pruned by LOP, with its weights in fewer bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lop import __version__
from lop.checkpoint.bits import check_widths, packing
from lop.checkpoint.export import read_manifest
from lop.checkpoint.shards import Cut
from lop.checkpoint.writing import Parts, companions, write_checkpoint
from lop.model.rounding import check_library
from lop.model.sources import MANIFEST, check_checkpoint, family_of
from lop.model.tensors import down_projections
from lop.storage.destination import check_new
from lop.storage.files import read_json
from lop.storage.location import Location


def quantise(
    source: Path,
    out: str | Path | Location,
    bits: int,
    *,
    name: str | None = None,
    vision: bool = False,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Writes the checkpoint of the same widths with its language backbone's linear layers quantised.

    Args:
        source: the checkpoint's folder.
        out: a new folder: a local path, a URI that pyarrow knows, or a location; it appears whole or not at all.
        bits: 8 or 4.
        name: what the manifest is to call a dense source; by default its folder.
        vision: quantises the vision tower, too.
        progress: called with the step (`"quantise"`, counted in matrices, or `"export"`, in bytes), how much of it is
            done, and how much it is in all.
        cancelled: asked after each matrix, and about every 8 MiB, whether to give up.

    Returns:
        The manifest: a pruned source's own, and what was done to it now.

    Raises:
        LopError: the source is none that LOP takes, is quantised already, or has widths that no group divides; `out` is
            there already, or the library is not.
        CancelledError: `cancelled` said so.
        OSError: the disk is full or read-only. After any error nothing is left behind.
    """
    check_library()
    tensors, family = check_checkpoint(source), family_of(source)
    chosen = packing(tensors, family, bits, vision=vision)
    has_manifest = (source / MANIFEST).exists()
    down = down_projections(tensors)
    check_widths(bits, [info.shape[1] for _, info in down])
    sizes = {tensor: chosen.bytes(info) if tensor in chosen.tensors else info.bytes for tensor, info in tensors.items()}
    place = Location.parse(out)
    check_new(place, bytes=sum(sizes.values()))
    manifest: dict[str, Any] = {
        "version": __version__,
        "source": name or str(source),
        "format": "dense",
        "widths": [info.shape[1] for _, info in down],
        "neurons": max(info.shape[1] for _, info in down),
        "padding_bytes": 0,
    }
    if has_manifest:
        manifest = {**read_manifest(source), "version": __version__}
        del manifest["sha256"]
    cuts = [(tensor, Cut(info, info.shape)) for tensor, info in tensors.items()]
    return write_checkpoint(
        place,
        Parts(cuts, read_json(source / "config.json"), manifest, companions(source)),
        source,
        family,
        packing=chosen,
        progress=lambda done, total: progress("export", done, total),
        on_matrix=lambda done, total: progress("quantise", done, total),
        cancelled=cancelled,
    )
