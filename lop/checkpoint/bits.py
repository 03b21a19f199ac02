"""Weights of 8 or 4 bits: which tensors get them, in what groups, and what they then weigh. Arithmetic without torch.

A weight matrix [N, K] of b bits is four tensors, the format `pack-quantized` of compressed-tensors: `weight_packed`, N
rows of whole 32-bit words; for every g numbers of a row a scale of the weights' own type, `weight_scale` [N, K/g], and
a zero point of b bits, `weight_zero_point`, whose columns are packed; and `weight_shape`, two int64.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Any

from lop.errors import LopError
from lop.model.families.family import Family
from lop.model.tensors import attention_tensor, ffn_part
from lop.space.size import ModelSize
from lop.storage.headers import TensorInfo

# Of a weight: as they are, and what they can be rounded to. The first is what is written where nothing is asked for.
BITS = (16, 8, 4)
QUANTISED = tuple(bits for bits in BITS if bits < 16)
# Below so many bits, rounding to the nearest costs too much (`lop.checkpoint.compensation`).
COMPENSATED = 8
# Numbers that share a scale. The largest that fits is taken; larger ones than 128 kernels do not have.
GROUPS = (128, 64, 32, 16, 8)
_SHAPE_BYTES = 16


@dataclass(frozen=True)
class Packing:
    """How a checkpoint's weights are quantised.

    Attributes:
        bits: of each number.
        group: numbers of a row that share a scale.
        tensors: the matrices that are quantised, by the checkpoint's names.
        kept: names of modules of the vision tower, as transformers has them, that are left as they are although it is
            quantised, because the group does not divide their rows.
        vision: whether the vision tower is quantised, too.
        empty: names of modules, as transformers has them, of parts that keep nothing, of which nothing is quantised.
    """

    bits: int
    group: int
    tensors: frozenset[str]
    kept: tuple[str, ...] = ()
    vision: bool = False
    empty: tuple[str, ...] = ()

    def without(self, names: Collection[str], family: Family) -> "Packing":
        """The same for a checkpoint in which some of these matrices have nothing in them."""
        gone = sorted(self.tensors & set(names))
        modules = tuple(family.parameter(name).removesuffix(".weight") for name in gone)
        return replace(self, tensors=self.tensors.difference(gone), empty=self.empty + modules)

    def bytes(self, info: TensorInfo) -> int:
        """What a matrix [N, K] comes to."""
        rows, columns = info.shape
        numbers = rows * _words(columns * self.bits)
        return numbers + columns // self.group * (rows * info.item_bytes + _words(rows * self.bits)) + _SHAPE_BYTES

    def weight(self, size: ModelSize, tensors: Mapping[str, TensorInfo], groups: int | None = None) -> "Weight":
        """The dense model's, with its weights quantised.

        Args:
            groups: of attention heads in a layer, where they are pruned.
        """
        saved = sum(tensors[name].bytes - self.bytes(tensors[name]) for name in self.tensors)
        item = next(tensors[name].item_bytes for name in self.tensors if ffn_part(name))
        row = size.neuron_parameters // 3  # A neuron is two rows of this length, and as long a column.
        neuron = 3 * (row * self.bits + row // self.group * (8 * item + self.bits))
        heads = 0 if groups is None else sum(self._group_bits(name, tensors[name], groups) for name in tensors)
        return Weight(self.bits, size.bytes - saved, neuron, heads, _SHAPE_BYTES)

    def _group_bits(self, name: str, info: TensorInfo, groups: int) -> int:
        """Of a tensor of the first layer's attention what one of its groups of heads holds."""
        found = attention_tensor(name)
        if found is None or found[0]:
            return 0
        if name not in self.tensors:
            return 8 * info.bytes // groups
        return 8 * (self.bytes(info) - _SHAPE_BYTES) // groups

    @cached_property
    def config(self) -> dict[str, Any]:
        """The `quantization_config` by which loaders know it."""
        kept = self.empty + (self.kept if self.vision else ())
        ignored = [f"re:.*{re.escape(name)}$" for name in kept] + ([] if self.vision else [r"re:.*visual\..*"])
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": self.group,
            "dynamic": False,
        }
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": ["re:.*lm_head$", *ignored],
            # transformers is to unpack when it loads: compressed-tensors does not read zero points packed later.
            "dequantize": True,
        }

    @property
    def about(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"bits": self.bits, "group": self.group, "vision": self.vision}


@dataclass(frozen=True)
class Weight:
    """What a model comes to with weights of so many bits.

    Attributes:
        bytes: of all tensors of the dense one.
        neuron_bits: that one neuron of one layer holds. Widths are multiples of the group, which makes whole bytes.
        group_bits: that one group of attention heads of one layer holds; 0 where it is not asked for.
        matrix_bytes: that any matrix takes beside its numbers, unless it has none.
    """

    bits: int
    bytes: int
    neuron_bits: int
    group_bits: int = 0
    matrix_bytes: int = 0


def check_bits(bits: int) -> None:
    """Looks at a number of bits.

    Raises:
        LopError: weights cannot be stored so.
    """
    if bits not in BITS:
        raise LopError(f"weights of {bits} bits cannot be written: name {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}")


def least_width(bits: int) -> int:
    """The fewest neurons that a layer of a quantised checkpoint may keep, if it keeps any.

    Zero points of so few rows that they are one word cannot be unpacked by compressed-tensors (seen in 0.20).
    """
    return 32 // bits + 1 if bits < COMPENSATED else 1


def is_too_narrow(bits: int, widths: Sequence[int]) -> bool:
    """Whether FFNs of these widths cannot have weights of so many bits."""
    return any(0 < width < least_width(bits) for width in widths)


def check_widths(bits: int, widths: Sequence[int]) -> None:
    """Looks at the widths that are to be quantised.

    Raises:
        LopError: a layer is too narrow.
    """
    if is_too_narrow(bits, widths):
        layer = min((layer for layer, width in enumerate(widths) if width), key=lambda layer: widths[layer])
        raise LopError(
            f"layer {layer} would keep {widths[layer]} neurons, and {bits} bits take {least_width(bits)} or more: "
            "prune less, or choose more bits"
        )


def packing(
    tensors: Mapping[str, TensorInfo],
    family: Family,
    bits: int,
    *,
    granularity: int | None = None,
    heads: int = 0,
    vision: bool = False,
) -> Packing:
    """How to quantise a checkpoint, or all that can be pruned of it.

    The linear layers of the language backbone are quantised. Embeddings and head are not: in half of the models they
    are one tensor, which is looked up as well as multiplied, and the format has no place for that.

    Args:
        tensors: the checkpoint's, by its names.
        granularity: of the widths that its layers will be pruned to; None where they stay as they are.
        heads: columns of `o_proj` that a group of heads has, where layers will keep some of them.
        vision: quantises the vision tower, too, as far as the group divides its rows.

    Raises:
        LopError: weights cannot have so many bits, or no group divides all rows.
    """
    check_bits(bits)
    matrices = [name for name, info in tensors.items() if len(info.shape) == 2]
    layers = [name for name in matrices if _is_of(name, f"{family.backbone}.layers", family)]
    widths = {tensors[name].shape[1] for name in layers} | {heads}
    common = gcd(*widths, granularity or 0)
    group = next((group for group in GROUPS if common % group == 0), None)
    if group is None:
        all_of = f"multiples of granularity {granularity} and " if granularity else ""
        raise LopError(
            f"weights of {bits} bits share a scale by groups of {GROUPS[-1]} to {GROUPS[0]}: "
            f"none divides the rows of all matrices, {all_of}{', '.join(map(str, sorted(widths - {0})))}"
        )
    tower = [name for name in matrices if _is_of(name, family.tower, family)]
    fits = {name for name in tower if tensors[name].shape[1] % group == 0}
    kept = tuple(family.parameter(name).removesuffix(".weight") for name in tower if name not in fits)
    found = Packing(bits, group, frozenset([*layers, *(fits if vision else ())]), kept if vision else (), vision)
    return found.without([name for name in layers if 0 in tensors[name].shape], family)


def _words(bits: int) -> int:
    """Bytes of the 32-bit words that hold so many bits."""
    return -(-bits // 32) * 4


def _is_of(name: str, module: str, family: Family) -> bool:
    return name.endswith(".weight") and family.parameter(name).startswith(f"{module}.")
