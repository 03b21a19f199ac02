"""Quantisation that makes up for its own errors, layer by layer, beside the refit of what is pruned.

Rounding to the nearest costs `smol` at 4 bits more than pruning a third of its neurons does. GPTQ (Frantar et al. 2023)
rounds one column after the other and lets those still to come make up for it, which takes the Gram matrix of what each
matrix is multiplied with: from the layers before it as they are quantised, and pruned, by then.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lop.checkpoint.bits import COMPENSATED, Packing
from lop.checkpoint.forecast import tell_refit
from lop.checkpoint.packing import stored_dtype, write_packed
from lop.checkpoint.recoveries import RECOVERIES, Recovery
from lop.checkpoint.recovery import CATCH_UP, recover_elastic
from lop.model.backbone import ROWS, Backbone, Heads, Layer
from lop.model.elastic import ElasticFfn, ElasticModel, Repair
from lop.model.encoding import Encoded, encode
from lop.model.families.lean import project_by, projections
from lop.model.image_settings import ImageSettings
from lop.model.normal import NormalEquations
from lop.model.repair import RIDGE, Biases
from lop.model.rounding import Rounding
from lop.model.samples import Sample
from lop.model.sources import check_checkpoint
from lop.model.streamed import StreamedModel
from lop.space.allocation import Allocation
from lop.storage.headers import TensorInfo

_PROJECTION = re.compile(r"layers\.(\d+)\..*\b(\w+_proj)\.weight$")

# A layer's weights as they are stored, by the names of its projections: `q_proj`, …, `down_proj`.
Packed = dict[str, dict[str, Tensor]]


class _Compensation:
    """One layer after the other; what `compensated` needs of the samples and of the layer at hand."""

    def __init__(self, backbone: Backbone, encoded: Encoded, rounding: Rounding, dtype: torch.dtype) -> None:
        self._backbone, self._rounding, self._dtype = backbone, rounding, dtype
        self._device = backbone.norm.device
        self.batches = encoded.batches
        self.states = [batch.embeddings for batch in encoded.batches]
        self.packed: Packed = {}

    def gram(self, given: Callable[[int, Tensor], Tensor]) -> Tensor:
        """`Σ x·xᵀ` of what a matrix is given, by the index of a batch and the states that it has now."""
        total: Tensor | None = None
        for index, x in enumerate(self.states):
            inputs = given(index, x.to(self._device))
            for part in inputs.split(ROWS):
                rows = part.float()
                product = (rows.T @ rows).double()
                total = product if total is None else total.add_(product)
        assert total is not None
        return total

    def pack(self, name: str, weight: Tensor, gram: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Keeps a projection's weight as it is stored, zeros filling it up to a shape; returns what is left of it."""
        rows, columns = weight.shape
        whole, wide = weight, gram
        if shape is not None and shape != (rows, columns):
            whole = weight.new_zeros(shape)
            whole[:rows, :columns] = weight
            wide = gram.new_zeros(shape[1], shape[1])
            wide[:columns, :columns] = gram
        packed = self._rounding.pack(whole.to(self._dtype), wide)
        self.packed[name] = packed
        return self._rounding.unpack(packed)[:rows, :columns].to(weight.dtype)

    def attention(self, layer: Layer, groups: int, stored: int, wanted: Sequence[Tensor] | None) -> None:
        """Quantises what a layer keeps of its attention, and takes the states through it.

        Where groups are pruned, `o_proj` is refitted first, as `feed_forward` refits `down_proj`.

        Args:
            stored: as many groups are written, those of zeros included.
            wanted: each batch's states [N, H] after the dense model's attention.
        """
        backbone, batches, heads = self._backbone, self.batches, layer.heads
        heads.keep(groups)
        if groups:
            self._heads(layer, heads, stored, None if groups == heads.groups else wanted)
        for index, x in enumerate(self.states):
            rotation = batches[index].rotation.to(self._device)
            self.states[index] = backbone.attend(layer, x.to(self._device), rotation, batches[index].groups).cpu()

    def _heads(self, layer: Layer, heads: Heads, stored: int, wanted: Sequence[Tensor] | None) -> None:
        backbone, batches, kept = self._backbone, self.batches, heads.width

        def said(index: int, x: Tensor) -> Tensor:
            return backbone.heads_output(layer, x, batches[index].rotation.to(self._device), batches[index].groups)

        def whole(lines: int) -> int:
            return lines // kept * stored

        hidden, columns = len(heads.out), heads.columns
        gram = self.gram(lambda _, x: backbone.attention_input(layer, x))
        named = zip(("q_proj", "k_proj", "v_proj"), projections(heads))
        project_by(heads, [self.pack(name, weight, gram, (whole(len(weight)), hidden)) for name, weight in named])
        if wanted is None:
            out, gram = heads.out, self.gram(said)
        else:
            normal = NormalEquations(heads.whole, columns)
            heads.keep(heads.groups)  # Pruned ones, which are not quantised, tell what is missing.
            for state, batch, output in zip(self.states, batches, wanted, strict=True):
                normal.add_heads(backbone, layer, batch, state.to(self._device), output.to(self._device), CATCH_UP)
            heads.keep(kept)
            gram = normal.gram.clone()
            out = normal.solve(RIDGE)
        heads.refit(self.pack("o_proj", out, gram, (hidden, whole(columns))))

    def feed_forward(self, layer: Layer, ffn: ElasticFfn, stored: int, wanted: Sequence[Tensor] | None) -> None:
        """Quantises a layer's FFN, refitted first if it is known what it should say, and takes the states through it.

        Then tokens count for the rounding of `down_proj`, too, as they do in the refit (`lop.checkpoint.recovery`). A
        layer that keeps all its neurons is not refitted.

        Args:
            stored: as many neurons are written, those of zeros included.
            wanted: each batch's states [N, H] after the dense model's layer.
        """
        if ffn.width:
            self._neurons(layer, ffn, stored, wanted)
        for index, state in enumerate(self.states):
            self.states[index] = self._backbone.feed_forward(layer, state.to(self._device)).cpu()

    def _neurons(self, layer: Layer, ffn: ElasticFfn, stored: int, wanted: Sequence[Tensor] | None) -> None:
        backbone, width, hidden = self._backbone, ffn.width, ffn.down.shape[0]
        gram = self.gram(lambda _, x: backbone.ffn_input(layer, x))
        for name, weight in (("gate_proj", ffn.gate), ("up_proj", ffn.up)):
            weight[:width] = self.pack(name, weight[:width], gram, (stored, hidden))
        down = ffn.down[:, :width]
        if wanted is None:
            gram = self.gram(lambda _, x: ffn.hidden(backbone.ffn_input(layer, x)))
        else:
            normal = self._normal_equations(layer, ffn, wanted)
            gram = normal.gram.clone()
            if width < ffn.neurons:
                down = normal.solve(RIDGE)
        ffn.refitted = self.pack("down_proj", down, gram, (hidden, stored))

    def _normal_equations(self, layer: Layer, ffn: ElasticFfn, wanted: Sequence[Tensor]) -> NormalEquations:
        """Those of the kept neurons' refit; pruned ones, which are not quantised, tell what is missing."""
        width = ffn.width
        normal = NormalEquations(ffn.down, width)
        ffn.width = ffn.neurons
        for state, output in zip(self.states, wanted, strict=True):
            normal.add(self._backbone, layer, state.to(self._device), output.to(self._device), CATCH_UP)
        ffn.width = width
        return normal


@torch.inference_mode()
def compensated(
    backbone: Backbone,
    layers: Iterable[Layer],
    encoded: Encoded,
    widths: Sequence[int],
    rounding: Rounding,
    *,
    dtype: torch.dtype,
    stored: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    refits: bool = True,
    repair: Repair | None = None,
) -> Iterator[Packed]:
    """Quantises one layer after the other, each with what the quantised ones before it make of the samples.

    Args:
        backbone: its own layers are not used, and may be on the meta device.
        layers: the decoder layers with an `ElasticFfn` each, which are changed; only the one at hand is in memory.
        widths: [L] neurons kept.
        dtype: of the weights as they are stored: their scales' type.
        stored: [L] neurons written, those of zeros included, and then all heads; None writes those kept.
        groups: [L] groups of attention kept; all if None.
        refits: solves for the `down_proj` and `o_proj` of what is pruned anew before they are quantised
            (`lop.checkpoint.recovery.refit`): it makes up for a share of what rounding costs the layers before, too.
        repair: what makes up for pruned neurons otherwise.

    Yields:
        Each layer's weights as they are stored, but for those of a part that keeps nothing; the layer has what they
        stand for. Memory: three hidden states for each calibration token, in the host's; on the device one batch, and a
        few Gram matrices in float64.
    """
    work = _Compensation(backbone, encoded, rounding, dtype)
    dense, device = list(work.states), backbone.norm.device
    for index, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        ffn, heads = cast(ElasticFfn, layer.ffn), layer.heads
        ffn.keep(ffn.neurons)
        heads.keep(heads.groups)
        if refits:
            for number, (x, batch) in enumerate(zip(dense, work.batches, strict=True)):
                dense[number] = backbone.attend(layer, x.to(device), batch.rotation.to(device), batch.groups).cpu()
        work.packed = {}
        kept = heads.groups if groups is None else groups[index]
        work.attention(layer, kept, kept if stored is None else heads.groups, dense if refits else None)
        if refits:
            dense = [backbone.feed_forward(layer, x.to(device)).cpu() for x in dense]
        ffn.keep(width)
        if repair is not None:
            repair(index, ffn)
        work.feed_forward(layer, ffn, width if stored is None else stored[index], dense if refits else None)
        yield work.packed


def compensate_checkpoint(
    checkpoint: Path,
    allocation: Allocation,
    recovery: Recovery,
    packing: Packing,
    folder: Path,
    *,
    order: np.ndarray,
    means: np.ndarray,
    samples: Sequence[Sample],
    batch_tokens: int,
    groups: np.ndarray | None = None,
    padded: bool = False,
    images: ImageSettings | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[tuple[str, TensorInfo]]]:
    """Writes the quantised weights of a pruned checkpoint's layers, for `lop.checkpoint.export`, one layer at a time.

    Args:
        packing: which tensors, and how; those of the vision tower are not made here.
        folder: where the files go; they are needed until the export is done.
        padded: all layers are stored as wide as the widest, with all heads.
        The others are those of `lop.checkpoint.recovery.recover_checkpoint`.

    Returns:
        By the name of each weight, the tensors that hold it.

    Raises:
        LopError: the checkpoint is damaged or no dense model that LOP takes, or the library is not there.
    """
    check_checkpoint(checkpoint, dense=True)
    streamed = StreamedModel(checkpoint, device=device, dtype=dtype)
    family, mending, count = streamed.model.family, RECOVERIES[recovery], len(order)
    widths, kept = allocation.widths[:count], allocation.widths[count:] or None
    names: dict[tuple[int, str], str] = {}
    for name in packing.tensors:
        if found := _PROJECTION.match(family.parameter(name).removeprefix(f"{family.backbone}.")):
            names[int(found.group(1)), found.group(2)] = name
    if mending.refits:
        tell_refit(streamed.model, samples, widths, max_pixels=None if images is None else images.max_pixels)
    layers = compensated(
        streamed.model.lean_backbone(),
        streamed.layers(order, groups),
        encode(streamed.model, samples, batch_tokens=batch_tokens, images=images),
        widths,
        Rounding(packing.bits, packing.group),
        dtype=stored_dtype(checkpoint),
        stored=[max(widths)] * count if padded else None,
        groups=kept,
        refits=mending.refits,
        repair=Biases(means) if mending.adds_bias else None,
    )
    progress(0, count)
    written: dict[str, list[tuple[str, TensorInfo]]] = {}
    for layer, packed in enumerate(layers):
        for projection, parts in packed.items():
            name = names[layer, projection]
            written[name] = write_packed(name, parts, folder / f"{layer:05d}-{projection}.safetensors")
        progress(layer + 1, count)
    return written


@contextmanager
def quantised_elastic(
    elastic: ElasticModel,
    allocation: Allocation,
    recovery: Recovery,
    rounding: Rounding | None,
    *,
    means: np.ndarray,
    calibration: Encoded,
    dtype: torch.dtype,
) -> Iterator[None]:
    """Gives an elastic model the weights that an export of the allocation would have; the dense ones after the block.

    Memory: the layers' weights a second time, in the host's.

    Args:
        rounding: of the weights; None leaves them as they are.
        means: [L, F] `E[h]` in the dense model's numbering, for `bias`.
        calibration: for `refit`, and for what compensates.
        dtype: of the weights as they are stored.
    """
    layers = elastic.backbone.layers
    kept = [[weight.to("cpu", copy=True) for weight in _weights(layer)] for layer in layers]
    mending = RECOVERIES[recovery]
    try:
        if rounding is not None and rounding.bits < COMPENSATED:
            repair = Biases(means) if mending.adds_bias else None
            widths, groups = allocation.widths[: len(layers)], allocation.widths[len(layers) :]
            made = compensated(
                elastic.backbone, layers, calibration, widths, rounding,
                dtype=dtype, groups=groups or None, refits=mending.refits, repair=repair,
            )  # fmt: skip
            for _ in made:
                pass
        else:
            recover_elastic(elastic, allocation, recovery, means=means, calibration=calibration)
            if rounding is not None:
                _round(layers, rounding, dtype)
        yield
    finally:
        elastic.restore()
        for layer, weights in zip(layers, kept):
            for weight, value in zip(_weights(layer), weights):
                weight.copy_(value)


def _weights(layer: Layer) -> list[Tensor]:
    ffn = cast(ElasticFfn, layer.ffn)
    return [layer.heads.qkv, layer.heads.out, ffn.gate, ffn.up, ffn.down]


@torch.inference_mode()
def _round(layers: Sequence[Layer], rounding: Rounding, dtype: torch.dtype) -> None:
    """Rounds the layers' weights to the nearest."""
    for layer in layers:
        ffn = cast(ElasticFfn, layer.ffn)
        down = ffn.down[:, : ffn.width] if ffn.refitted is None else ffn.refitted
        if ffn.width:
            ffn.refitted = rounding.rounded(down.to(dtype)).to(down.dtype)
        for weight in _weights(layer)[:-1]:
            if weight.numel():
                weight.copy_(rounding.rounded(weight.to(dtype)))
