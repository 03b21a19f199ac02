"""What a pruned checkpoint looks like on disk: safetensors or GGUF, true widths or all padded to one."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lop.checkpoint.bits import BITS
from lop.checkpoint.edge.types import KINDS, check_library
from lop.checkpoint.recoveries import RECOVERIES, UNTRAINED, Recovery
from lop.checkpoint.shards import Cut
from lop.errors import LopError
from lop.model.families.registry import FAMILIES
from lop.model.sources import MODELING
from lop.model.tensors import attention_tensor, ffn_layer, ffn_part
from lop.storage.headers import TensorInfo

# A key of `FORMATS`.
Format = str


@dataclass(frozen=True)
class KeptHeads:
    """What is kept of pruned attention.

    Attributes:
        order: [L, K] groups of each layer, the most important first.
        widths: [L] groups kept.
    """

    order: np.ndarray
    widths: Sequence[int]

    @property
    def groups(self) -> int:
        """`K`, of a dense layer."""
        return int(self.order.shape[1])

    def cut(self, name: str, info: TensorInfo, recovered: TensorInfo | None, *, is_padded: bool) -> Cut:
        """What to write of a tensor of the attention; padded to all heads, as loaders want so many.

        Raises:
            LopError: the recovered tensor has another shape than the one that it replaces would be cut to.
        """
        found = attention_tensor(name)
        assert found
        layer, axis = found[0], 1 if found[1:] == ("o_proj", "weight") else 0
        block, width = info.shape[axis] // self.groups, self.widths[layer]

        def shape(groups: int) -> tuple[int, ...]:
            return (*info.shape[:axis], groups * block, *info.shape[axis + 1 :])

        if recovered is not None:
            _check_recovered(name, recovered, shape(width))
            chosen = np.arange(width * block)
        else:
            chosen = (self.order[layer][:width, None] * block + np.arange(block)).ravel()
        rows, columns = (None, chosen) if axis else (chosen, None)
        return Cut(recovered or info, shape(self.groups if is_padded else width), rows=rows, columns=columns)


@dataclass(frozen=True)
class Layout:
    """How a format stores layers.

    Attributes:
        is_padded: each as wide as the widest, and with all heads, filled up with zeros.
        holds_bias: there is a place for a bias of `down_proj`.
        gguf: the type of the weights in GGUF files, a key of `KINDS`; None for safetensors, of the dense model's type.
    """

    is_padded: bool
    holds_bias: bool
    gguf: str | None = None

    def stored(self, widths: Sequence[int]) -> list[int]:
        """[L] neurons on disk of layers that keep `widths` [L], those of zeros included."""
        if not self.is_padded:
            return list(widths)
        block = KINDS[self.gguf].block if self.gguf else 1
        return [-(-max(widths) // block) * block] * len(widths)


_GGUF = {"": "f16", "-q8_0": "q8_0", "-q4_1": "q4_1", "-q4_0": "q4_0"}
FORMATS = {
    "hf": Layout(is_padded=False, holds_bias=True),
    "padded": Layout(is_padded=True, holds_bias=False),
    **{f"gguf{end}": Layout(is_padded=True, holds_bias=False, gguf=kind) for end, kind in _GGUF.items()},
    **{f"gguf-true{end}": Layout(is_padded=False, holds_bias=False, gguf=kind) for end, kind in _GGUF.items()},
}


def check_format(format: Format, recovery: Recovery, bits: int = BITS[0]) -> None:
    """Looks before anything is done for nothing.

    Raises:
        LopError: the format has no place for what the recovery adds, or for weights of so many bits; the recovery
            trains, which neither fewer bits nor GGUF go with; or what writes the format is not installed.
    """
    if bits != BITS[0] and RECOVERIES[recovery].trains:
        raise LopError(
            f"recovery {recovery!r} trains weights that are not quantised: write it without bits, then run "
            f"`lop quantise --bits {bits}` on what comes of it"
        )
    if FORMATS[format].gguf:
        safe = " or ".join(repr(name) for name, layout in FORMATS.items() if not layout.gguf)
        if bits != BITS[0]:
            raise LopError(f"format {format!r} has weights of a type of its own: leave out {bits} bits, or take {safe}")
        if RECOVERIES[recovery].trains:
            raise LopError(f"recovery {recovery!r} trains what transformers loads: take {safe}, then `lop convert` it")
        check_library()
    if RECOVERIES[recovery].adds_bias and not FORMATS[format].holds_bias:
        fits = " or ".join(repr(name) for name in reversed(UNTRAINED) if not UNTRAINED[name].adds_bias)
        others = " or ".join(repr(name) for name, layout in FORMATS.items() if layout.holds_bias)
        raise LopError(f"format {format!r} has no place for a bias: choose recovery {fits}, or format {others}")


def check_heads(format: Format) -> None:
    """Looks before anything is done whether a format goes with pruned attention.

    Raises:
        LopError: it does not.
    """
    if FORMATS[format].gguf and not FORMATS[format].is_padded:
        padded = format.replace("-true", "")
        raise LopError(
            f"format {format!r} stores true widths of FFNs, and all heads in all layers: with attention pruned take "
            f"{padded!r}, which fills both up with zeros, or 'hf'"
        )


def cut_tensors(
    tensors: Mapping[str, TensorInfo],
    order: Sequence[np.ndarray] | np.ndarray,
    widths: Sequence[int],
    *,
    format: Format,
    recovered: Mapping[str, TensorInfo],
    heads: KeptHeads | None = None,
) -> list[tuple[str, Cut]]:
    """What to write of each tensor of a checkpoint.

    Args:
        tensors: the checkpoint's.
        order: [L, F] neurons of each layer, the most important first; a checkpoint whose layers differ has as many
            arrays of as many neurons.
        widths: [L] neurons kept.
        recovered: tensors that take the place of those cut from the dense checkpoint, of any part, with the neurons
            kept in their order (`down_proj` weights [H, k], `gate_proj` and `up_proj` [k, H]), or that come on top
            (biases), by the checkpoint's names.
        heads: what is kept of attention; None keeps all.

    Raises:
        LopError: a recovered tensor has another shape than the one that it replaces would be cut to.
    """
    stored, is_padded = FORMATS[format].stored(widths), FORMATS[format].is_padded
    cuts = [
        (name, heads.cut(name, info, recovered.get(name), is_padded=is_padded))
        if heads and attention_tensor(name)
        else (name, _cut(name, info, recovered.get(name), order, widths, stored))
        for name, info in tensors.items()
    ]
    return cuts + [(name, Cut(info, info.shape)) for name, info in recovered.items() if name not in tensors]


def changed_tensors(
    tensors: Mapping[str, TensorInfo], changed: Mapping[str, TensorInfo], *, format: Format
) -> list[tuple[str, Cut]]:
    """What to write of each tensor of a pruned checkpoint of which some have changed.

    Args:
        tensors: the checkpoint's.
        changed: what takes the place of some of them; of FFNs and attention what their layer keeps, even if it is
            padded.

    Raises:
        LopError: a tensor that is not there, or of another shape, is said to have changed.
    """
    cuts = []
    for name, info in tensors.items():
        source, part = changed.get(name, info), ffn_part(name) or (attention_tensor(name) or (0, None))[1]
        pads = FORMATS[format].is_padded and part is not None
        axis = 1 if part in ("down_proj", "o_proj") else 0
        if not pads and source.shape != info.shape:
            raise LopError(f"tensor {name} is {list(source.shape)}, and must be {list(info.shape)}")
        chosen = np.arange(source.shape[axis]) if source is not info and pads else None
        rows, columns = (None, chosen) if axis else (chosen, None)
        cuts.append((name, Cut(source, info.shape, rows=rows, columns=columns)))
    if unknown := changed.keys() - tensors.keys():
        raise LopError(f"tensor {min(unknown)} is not in the checkpoint")
    return cuts


def _cut(
    name: str,
    info: TensorInfo,
    recovered: TensorInfo | None,
    order: Sequence[np.ndarray] | np.ndarray,
    widths: Sequence[int],
    stored: Sequence[int],
) -> Cut:
    part = ffn_part(name)
    kept = None if part is None else order[ffn_layer(name)][: widths[ffn_layer(name)]]

    def shape(width: int) -> tuple[int, ...]:
        return (info.shape[0], width) if part == "down_proj" else (width, *info.shape[1:])

    expected = info.shape if kept is None else shape(len(kept))
    if recovered is not None:
        _check_recovered(name, recovered, expected)
    source = recovered or info
    if kept is None:
        return Cut(source, expected)
    chosen = np.arange(len(kept)) if recovered else kept
    full = shape(stored[ffn_layer(name)])
    return Cut(source, full, columns=chosen) if part == "down_proj" else Cut(source, full, rows=chosen)


def _check_recovered(name: str, recovered: TensorInfo, expected: tuple[int, ...]) -> None:
    if recovered.shape != expected:
        raise LopError(f"recovered tensor {name} is {list(recovered.shape)}, and must be {list(expected)}")


def pruned_config(
    dense: Mapping[str, Any],
    widths: Sequence[int],
    *,
    format: Format,
    bias: bool,
    heads: KeptHeads | None = None,
) -> dict[str, Any]:
    """The config of a pruned checkpoint: the dense one's, whatever transformers wrote it, with the widths.

    `padded` sets `intermediate_size`. `hf` sets `text_config.per_layer_config` (transformers' schema of layers that
    differ) and `auto_map`. A flat config keeps its keys beside the `text_config` that it gets: transformers before
    4.52 reads the former, later ones the latter.

    Args:
        dense: what stands in the dense checkpoint's `config.json`.
        widths: [L] neurons kept.
        bias: whether the layers' `down_proj` have one.
        heads: what is kept of attention; None keeps all.
    """
    family = FAMILIES[dense["model_type"]]
    config = copy.deepcopy(dict(dense))
    if FORMATS[format].is_padded:
        config.get("text_config", config)["intermediate_size"] = max(widths)
        return config
    config["text_config"] = family.text_config(config)
    digits = len(str(len(widths) - 1))
    layers = [{"intermediate_size": int(width)} for width in widths]
    if heads:
        text = config["text_config"]
        shared = text["num_attention_heads"] // heads.groups
        # Rotary embeddings would compute it from the heads, of which there is no one number.
        text.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
        for layer, kept in zip(layers, heads.widths, strict=True):
            layer |= {"num_attention_heads": int(kept) * shared, "num_key_value_heads": int(kept)}
    config["text_config"]["per_layer_config"] = {
        str(number).zfill(digits): layer for number, layer in enumerate(layers)
    }
    if bias:
        config["text_config"]["down_proj_bias"] = True
    config["architectures"] = [family.pruned_class]
    config["auto_map"] = {"AutoModelForImageTextToText": f"{MODELING.removesuffix('.py')}.{family.pruned_class}"}
    return config
