"""Recovery without training: what is left of each part is made to say what the whole part said.

`bias` adds the pruned neurons' mean contribution, as FLAP does (An et al. 2023). `refit` solves for new `down_proj`
weights, and where attention is pruned for new `o_proj` weights, by ridge least squares on the calibration samples,
layer by layer, each layer seeing what the refitted ones before it give. It needs no bias, so every format and every
loader carries it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lop.checkpoint.forecast import tell_refit
from lop.checkpoint.recoveries import RECOVERIES, Recovery
from lop.model.backbone import Backbone, Layer
from lop.model.dtypes import DTYPES
from lop.model.elastic import ElasticFfn, ElasticModel, Repair
from lop.model.encoding import Encoded, encode
from lop.model.image_settings import ImageSettings
from lop.model.normal import NormalEquations
from lop.model.repair import RIDGE, Biases, Refits, factors
from lop.model.samples import Sample
from lop.model.sources import check_checkpoint
from lop.model.streamed import StreamedModel
from lop.model.tensors import down_projections, out_projections
from lop.space.allocation import Allocation
from lop.storage.files import disk_errors
from lop.storage.headers import TensorInfo, read_header

# Of what the refitted layers before still get wrong, the share that a layer makes up for: `benchmarks/recovery.py`.
CATCH_UP = 0.5


def recover_elastic(
    elastic: ElasticModel, allocation: Allocation, recovery: Recovery, *, means: np.ndarray, calibration: Encoded | None
) -> None:
    """Gives an elastic model the allocation's widths, and what recovery makes of the layers with these.

    Args:
        means: [L, F] `E[h]` in the dense model's numbering, for `bias`.
        calibration: for `refit`, which wants it.
    """
    mending = RECOVERIES[recovery]
    elastic.prune(allocation, Biases(means) if mending.adds_bias else None)
    if mending.refits:
        assert calibration
        layers = elastic.backbone.layers
        widths, groups = allocation.widths[: len(layers)], allocation.widths[len(layers) :]
        for _ in refit(elastic.backbone, layers, calibration, widths, groups or None):
            pass


def repair_for(
    recovery: Recovery,
    elastic: ElasticModel,
    *,
    means: np.ndarray,
    calibration: Callable[[], Encoded],
    cache_bytes: int,
    attention: bool = False,
) -> Repair | None:
    """What candidates are scored with where they ship with a recovery.

    For `refit` that is one with the dense model's activations, from one factor a layer (`lop.model.repair.Refits`).

    Args:
        elastic: dense, and in the order in which neurons are kept.
        means: [L, F] `E[h]` in the dense model's numbering, for `bias`.
        calibration: makes the samples for `refit`; a pass over them.
        cache_bytes: for weights solved for.
        attention: is pruned, too.
    """
    mending = RECOVERIES[recovery]
    if mending.refits:
        return Refits(factors(elastic.backbone, calibration(), attention=attention), cache_bytes=cache_bytes)
    return Biases(means) if mending.adds_bias else None


def recover_checkpoint(
    checkpoint: Path,
    allocation: Allocation,
    recovery: Recovery,
    folder: Path,
    *,
    order: np.ndarray,
    means: np.ndarray,
    samples: Sequence[Sample],
    batch_tokens: int,
    images: ImageSettings | None = None,
    device: str = "auto",
    dtype: str = "auto",
    groups: np.ndarray | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, TensorInfo]:
    """Writes the tensors that recovery changes or adds, for `lop.checkpoint.export`, one layer at a time.

    `refit` holds two decoder layers in memory, the one at hand and the next, beside the vision tower and the
    embeddings; `bias` one matrix.

    Args:
        checkpoint: the dense checkpoint.
        folder: where the files go; they are needed until the export is done.
        order: [L, F] neurons of each layer, the most important first.
        means: [L, F] `E[h]` in the dense model's numbering, for `bias`.
        samples: the calibration samples, for `refit`.
        batch_tokens, images: as in `lop.model.encoding.encode`.
        groups: [L, K] groups of each layer's attention, the most important first, where they are pruned.
        progress: called with the layers done and their number.

    Returns:
        By the checkpoint's own names, where each tensor is; empty for `none`.

    Raises:
        LopError: the checkpoint is damaged or no dense model that LOP takes.
    """
    mending = RECOVERIES[recovery]
    if not (mending.adds_bias or mending.refits):
        return {}
    tensors = check_checkpoint(checkpoint, dense=True)
    down = down_projections(tensors)
    layers = len(down)
    new: Iterator[tuple[Tensor, ...]]
    names: list[tuple[str, ...]]
    if mending.adds_bias:
        new = ((bias,) for bias in _biases(down, allocation, order, means))
        names = [(name.removesuffix("weight") + "bias",) for name, _ in down]
    else:
        streamed = StreamedModel(checkpoint, device=device, dtype=dtype)
        widths, kept = allocation.widths[:layers], allocation.widths[layers:] or None
        tell_refit(streamed.model, samples, widths, max_pixels=None if images is None else images.max_pixels)
        encoded = encode(streamed.model, samples, batch_tokens=batch_tokens, images=images)
        new = refit(streamed.model.lean_backbone(), streamed.layers(order, groups), encoded, widths, kept)
        outs = out_projections(tensors) if kept else [()] * layers
        names = [(name, *out) for (name, _), out in zip(down, outs, strict=True)]
    progress(0, layers)
    found: dict[str, TensorInfo] = {}
    for layer, (mine, (_, info), made) in enumerate(zip(names, down, new), start=1):
        file = folder / f"{layer:05d}.safetensors"
        stored = {name: tensor.to("cpu", DTYPES[info.dtype]).contiguous() for name, tensor in zip(mine, made)}
        with disk_errors(file):
            save_file(stored, file)
        found |= read_header(file)
        progress(layer, layers)
    return found


def _biases(
    down: Sequence[tuple[str, TensorInfo]], allocation: Allocation, order: np.ndarray, means: np.ndarray
) -> Iterator[Tensor]:
    """Each layer's `W_down[:, pruned] · E[h_pruned]`, [H]."""
    for (name, info), width, row, mean in zip(down, allocation.widths, order, means):
        with safe_open(info.file, framework="pt") as file:
            yield file.get_tensor(name)[:, row[width:]].double() @ torch.from_numpy(mean[row[width:]])


class Refitted(NamedTuple):
    """A layer's weights for what it keeps: `down_proj` [H, k], and `o_proj` [H, columns]."""

    down: Tensor
    out: Tensor


@torch.inference_mode()
def refit(
    backbone: Backbone,
    layers: Iterable[Layer],
    encoded: Encoded,
    widths: Sequence[int],
    groups: Sequence[int] | None = None,
    *,
    ridge: float = RIDGE,
    catch_up: float = CATCH_UP,
) -> Iterator[Refitted]:
    """Refits one layer after the other, so that each pruned FFN says what the whole one would, and catches up.

    For a calibration token let `h` be the kept neurons' activations in the pruned model, whose earlier layers are
    refitted already, `r` the residual stream that the FFN adds to, `w` what the whole FFN would add to it, and `o` the
    dense model's output of this layer. The new weights `W + Δ` minimise `Σ ‖(W + Δ)·h − t‖² / ‖o‖² + λ‖Δ‖²` over the
    tokens, where the target makes up for a share `c` of what the earlier layers still get wrong:

        t = w + c·(o − r − w),
        Δ = (T − W·G)·(G + λI)⁻¹,   G = Σ h·hᵀ / ‖o‖²,   T = Σ t·hᵀ / ‖o‖²,   λ = ridge · mean(diag G).

    Every later layer sees its input normed, so it is the relative error that counts: without the division the few
    tokens of huge norm that pretrained models have (attention sinks) decide everything. All of the earlier layers'
    error as a target is learned by heart. The ridge pulls towards the weights that are there, so an activation that
    calibration never saw keeps them.

    Where attention is pruned, its `o_proj` comes first in the same way: `h` is then what the kept heads say, `r` the
    residual stream before the layer, and `o` that of the dense model between the layer's attention and its FFN.

    Args:
        backbone: its own layers are not used, and may be on the meta device.
        layers: the decoder layers with an `ElasticFfn` each; only the one at hand needs to be in memory.
        widths: [L] neurons kept.
        groups: [L] groups of attention kept; all if None.
        catch_up: `c`.

    Yields:
        Each layer's weights, in the dense weights' dtype; the layer has them already, and a part that keeps all its
        units, or none, keeps its weights. Memory: three hidden states for each calibration token, in the host's; on the
        device one batch, and G, [k, k] in float64, twice.
    """
    device = backbone.norm.device
    dense = [batch.embeddings for batch in encoded.batches]
    pruned: list[Tensor] | None = None  # As in the dense model, up to the first layer that loses anything.
    for number, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        ffn, heads = cast(ElasticFfn, layer.ffn), layer.heads
        ffn.keep(ffn.neurons)
        heads.keep(heads.groups)
        kept = heads.groups if groups is None else groups[number]
        if pruned is None and (kept < heads.groups or width < ffn.neurons):
            pruned = list(dense)
        if pruned is not None and kept < heads.groups:
            _refit_heads(backbone, layer, encoded, kept, dense, pruned, ridge=ridge, catch_up=catch_up)
        normal = NormalEquations(ffn.down, width) if 0 < width < ffn.neurons else None
        for index, batch in enumerate(encoded.batches):
            rotation = batch.rotation.to(device)
            output = dense[index].to(device)
            if kept == heads.groups:
                output = backbone.attend(layer, output, rotation, batch.groups)
            output = backbone.feed_forward(layer, output)
            dense[index] = output.to("cpu")
            if pruned is None:
                continue
            residual = backbone.attend(layer, pruned[index].to(device), rotation, batch.groups)
            if normal:
                normal.add(backbone, layer, residual, output, catch_up)
            pruned[index] = residual.to("cpu")
        ffn.keep(width)
        if normal:
            ffn.refit(normal.solve(ridge))
        residuals = pruned or []
        for index, residual in enumerate(residuals):
            residuals[index] = backbone.feed_forward(layer, residual.to(device)).to("cpu")
        yield Refitted(ffn.down[:, :width] if ffn.refitted is None else ffn.refitted, heads.out)


def _refit_heads(
    backbone: Backbone,
    layer: Layer,
    encoded: Encoded,
    kept: int,
    dense: list[Tensor],
    pruned: Sequence[Tensor],
    *,
    ridge: float,
    catch_up: float,
) -> None:
    """Leaves a layer its first groups of heads, refitted, and takes the dense model's states through all of them.

    Args:
        layer: with all its heads.
        dense, pruned: each batch's states [N, H] before the layer; the former are those after its attention then.
    """
    heads, device = layer.heads, backbone.norm.device
    heads.keep(kept)
    columns = heads.columns
    heads.keep(heads.groups)
    normal = NormalEquations(heads.whole, columns) if kept else None
    for index, batch in enumerate(encoded.batches):
        rotation = batch.rotation.to(device)
        output = backbone.attend(layer, dense[index].to(device), rotation, batch.groups)
        if normal:
            normal.add_heads(backbone, layer, batch, pruned[index].to(device), output, catch_up)
        dense[index] = output.to("cpu")
    heads.keep(kept)
    if normal:
        heads.refit(normal.solve(ridge))
