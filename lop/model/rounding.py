"""Weights rounded to a few bits by groups, as compressed-tensors packs them."""

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from lop.errors import LopError

LIBRARY = "compressed-tensors"
# Before, transformers did not unpack when it loads, and compressed-tensors alone does not read packed zero points.
_TRANSFORMERS = "5.24"
# Shares of a group's span that its numbers may reach over: what lies beyond is cut off, and the rest is finer.
_REACHES = tuple(1 - 0.05 * step for step in range(10))
# Of the mean of a Gram matrix's diagonal: what is added to it, as GPTQ does.
_DAMPING = 0.01
_BLOCK = 128


def check_library() -> None:
    """Looks whether the library is there, and a transformers that unpacks what it has packed.

    Raises:
        LopError: one is not.
    """
    if find_spec("compressed_tensors") is None:
        raise LopError(f"quantised weights need {LIBRARY}: pip install 'lop-vl[quantise]'")
    if Version(found := version("transformers")) < Version(_TRANSFORMERS):
        needed = f"transformers {_TRANSFORMERS} or later, not {found}"
        raise LopError(f"quantised weights need {needed}: pip install 'lop-vl[quantise]'")


def library() -> str:
    """The library with its version."""
    return f"{LIBRARY} {version(LIBRARY)}"


class Rounding:
    """Integers of `bits` bits, by groups of `group` numbers of a row that share a scale and a zero point.

    Of ten grids, which span 100, 95, … 55% of what a group's numbers do, each group takes the one that leaves the least
    squared error.

    Attributes:
        bits: of each number.

    Raises:
        LopError: the library is not there.
    """

    def __init__(self, bits: int, group: int) -> None:
        check_library()
        from compressed_tensors.compressors import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        self.bits, self._group = bits, group
        self._least, self._most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self._compressor: Any = PackedQuantizationCompressor
        weights = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=group)
        self._scheme = QuantizationScheme(targets=["Linear"], weights=weights)

    @torch.no_grad()
    def pack(self, weight: Tensor, gram: Tensor | None = None) -> dict[str, Tensor]:
        """A matrix [N, K] as the tensors that hold it: `weight_packed`, `_scale`, `_zero_point` and `_shape`.

        Args:
            gram: `Σ x·xᵀ` [K, K] of what the matrix is multiplied with: then numbers are not rounded to the nearest,
                but one column after the other, each rounding made up for by those that are still to come (GPTQ,
                Frantar et al. 2023). None rounds to the nearest.
        """
        if gram is None:
            scale, zero = self._grid(weight.float().unflatten(1, (-1, self._group)), weight.dtype)
            values = weight.float()
        else:
            values, scale, zero = self._compensated(weight.float(), gram, weight.dtype)
        state = {"weight": values, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zero.to(torch.int8)}
        packed: dict[str, Tensor] = self._compressor.compress(state, self._scheme)
        return packed

    @torch.no_grad()
    def unpack(self, packed: dict[str, Tensor]) -> Tensor:
        """The matrix [N, K] that the tensors stand for, in the scales' type."""
        weight: Tensor = self._compressor.decompress(packed, self._scheme)["weight"]
        return weight

    def rounded(self, weight: Tensor, gram: Tensor | None = None) -> Tensor:
        """What is left of a matrix [N, K] once it has been packed, in its own type; arguments as in `pack`."""
        return self.unpack(self.pack(weight, gram))

    def _grid(self, groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales and zero points [N, G] of groups [N, G, g], in float32; scales as `dtype` holds them."""
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales, zeros = torch.empty_like(low), torch.empty_like(low)
        least_error = torch.full_like(low, torch.inf)
        for reach in _REACHES:
            # Rounded as it is stored, as that is what numbers are divided by.
            scale = ((high - low) * reach / (self._most - self._least)).clamp(min=torch.finfo(dtype).tiny)
            scale = scale.to(dtype).float()
            zero = (self._least - low * reach / scale).round().clamp(self._least, self._most)
            error = (self._nearest(groups, scale[..., None], zero[..., None]) - groups).square_().sum(2)
            is_better = error < least_error
            scales, zeros = torch.where(is_better, scale, scales), torch.where(is_better, zero, zeros)
            least_error = torch.minimum(error, least_error)
        return scales, zeros

    def _nearest(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The grid's numbers nearest to some."""
        return ((values / scale + zero).round_().clamp_(self._least, self._most) - zero).mul_(scale)

    def _compensated(self, weight: Tensor, gram: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """What GPTQ makes of a matrix [N, K]: numbers of the grid [N, K], scales and zero points [N, K / group]."""
        upper = _inverse_factor(gram)
        columns = weight.T.contiguous()  # [K, N]: one column after the other is read and written.
        scales, zeros = [], []
        block = max(_BLOCK, self._group)
        for first in range(0, len(columns), block):
            mine, factor = columns[first : first + block], upper[first : first + block, first : first + block]
            errors = torch.empty_like(mine)
            for index in range(len(mine)):
                if (first + index) % self._group == 0:
                    scale, zero = self._grid(mine[index : index + self._group].T[:, None], dtype)
                    scales.append(scale)
                    zeros.append(zero)
                rounded = self._nearest(mine[index], scales[-1][:, 0], zeros[-1][:, 0])
                torch.div(mine[index] - rounded, factor[index, index], out=errors[index])
                mine[index + 1 :].addr_(factor[index, index + 1 :], errors[index], alpha=-1)
                mine[index] = rounded
            rest = first + len(mine)
            columns[rest:].addmm_(upper[first:rest, rest:].T, errors, alpha=-1)
        return columns.T.contiguous(), torch.cat(scales, 1), torch.cat(zeros, 1)


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper factor U of `(G + λI)⁻¹ = Uᵀ·U`, [K, K] float32."""
    damped = gram.double().clone()  # What is silent on all samples leaves zeros on the diagonal.
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean() + torch.finfo(torch.float32).tiny)
    # With rows and columns in reverse, the lower factor L of G + λI is an upper one, R, and U is its inverse.
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).float()
