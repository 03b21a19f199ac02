"""What one pass over the calibration samples learns of every FFN neuron."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from tqdm import tqdm

from lop.adapter import QwenVL
from lop.encoding import Encoded, on_device
from lop.errors import LopError
from lop.files import atomic_file, disk_errors

_FIELDS = ("count", "mean", "moment", "down_l2", "down_l1")
_EXPONENTS = "exponents"
_COLUMNS = 2**24  # Numbers that are summed in float64 at once.
# Of some tokens: how many, mean and centred second moment of each neuron.
_Sums = tuple[int, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class NeuronStatistics:
    """Sums over the real tokens of the calibration samples, for each neuron `h = act(gate(x)) * up(x)`.

    Attributes:
        count: tokens seen.
        mean: [L, F], float64, `E[h]`.
        moment: [L, F], float64, the centred second moment `Σ (h − E[h])²`.
        down_l2: [L, F], float64, `‖W_down[:, j]‖₂`.
        down_l1: [L, F], float64, `mean_i |W_down[i, j]|`.
        exponents: [L], float64, the tail exponents of the layers' spectra (`tail_exponent`); None where they were not
            measured.
    """

    count: int
    mean: np.ndarray
    moment: np.ndarray
    down_l2: np.ndarray
    down_l1: np.ndarray
    exponents: np.ndarray | None = None

    @property
    def variance(self) -> np.ndarray:
        """[L, F], the population variance of each neuron over tokens."""
        return self.moment / self.count

    @property
    def squares(self) -> np.ndarray:
        """[L, F], `Σ h²`."""
        return self.moment + self.count * self.mean**2

    def merge(self, other: "NeuronStatistics") -> "NeuronStatistics":
        """The statistics of both sets of tokens together, of the same weights."""
        sums = _merge((self.count, self.mean, self.moment), (other.count, other.mean, other.moment))
        return NeuronStatistics(*sums, self.down_l2, self.down_l1, self.exponents)

    def save(self, path: Path, fingerprints: Mapping[str, str]) -> None:
        """Writes a safetensors file whose metadata names what the statistics were made from."""
        arrays = {name: np.asarray(getattr(self, name)) for name in _FIELDS}
        if self.exponents is not None:
            arrays[_EXPONENTS] = self.exponents
        with atomic_file(path) as temporary, disk_errors(path):
            save_file(arrays, temporary, metadata=dict(fingerprints))


def load_statistics(path: Path) -> tuple[NeuronStatistics, dict[str, str]]:
    """Reads statistics and the fingerprints they were saved with.

    Raises:
        LopError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            names = [*_FIELDS, *({_EXPONENTS} & set(file.keys()))]  # Earlier files have no exponents.
            arrays = {name: file.get_tensor(name) for name in names}
            return NeuronStatistics(int(arrays.pop("count")), **arrays), dict(file.metadata() or {})
    except FileNotFoundError:
        raise LopError(f"{path} is missing: run `lop calibrate` first") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise LopError(f"{path} is damaged: {error}") from None


@torch.inference_mode()
def calibrate(model: QwenVL, encoded: Encoded, *, progress: bool = False) -> NeuronStatistics:
    """Collects the statistics of the dense model in one pass, without any padding.

    Each batch is summed in float64 and merged exactly, so batch sizes and order change no more than rounding.
    """
    layers = len(model.ffns)
    norms = [_column_norms(ffn.down_proj.weight) for ffn in model.ffns]
    down_l2, down_l1 = (np.stack([pair[index] for pair in norms]) for index in range(2))
    backbone = model.lean_backbone()
    exponents = np.array(
        [np.mean([tail_exponent(m.weight) for m in (f.gate_proj, f.up_proj, f.down_proj)]) for f in model.ffns]
    )
    total: NeuronStatistics | None = None
    for batch in tqdm(
        on_device(encoded.batches, model.device),
        desc="calibrate",
        unit="batch",
        total=len(encoded.batches),
        disable=not progress,
    ):
        sums: list[_Sums] = [(0, np.empty(0), np.empty(0))] * layers
        hooks = [
            ffn.down_proj.register_forward_pre_hook(_collector(sums, layer)) for layer, ffn in enumerate(model.ffns)
        ]
        try:
            for _ in backbone.hidden(batch.embeddings, batch.rotation, batch.groups):
                pass  # The hooks see what there is to see.
        finally:
            for hook in hooks:
                hook.remove()
        mean, moment = (np.stack([found[index] for found in sums]) for index in (1, 2))
        part = NeuronStatistics(len(batch), mean, moment, down_l2, down_l1, exponents)
        total = part if total is None else total.merge(part)
    assert total is not None
    return total


def tail_exponent(weight: Tensor) -> float:
    """The exponent α of a power law fitted to the tail of a matrix's spectrum: smaller is heavier-tailed.

    Hill's estimator over the upper half of the n eigenvalues λ of `WᵀW` (or `WWᵀ`, the smaller), with k = n // 2:
    `α = 1 + k / Σ_{i ≤ k} ln(λ_(n−i+1) / λ_(n−k))` (PL_Alpha_Hill of AlphaPruning, Lu et al., NeurIPS 2024).

    Args:
        weight: [m, n] with min(m, n) > 1.
    """
    matrix = weight.float()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    spectrum = torch.linalg.eigvalsh(gram).clamp_min(torch.finfo(torch.float32).tiny).double()
    half = len(spectrum) // 2
    return 1 + half / max(float((spectrum[-half:] / spectrum[-half - 1]).log().sum()), 1e-12)


def _merge(first: _Sums, second: _Sums) -> _Sums:
    """Of both sets of tokens together (Chan, Golub & LeVeque 1983)."""
    count = first[0] + second[0]
    delta = second[1] - first[1]
    mean = first[1] + delta * (second[0] / count)
    return count, mean, first[2] + second[2] + delta**2 * (first[0] * second[0] / count)


def _collector(sums: list[_Sums], layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # In float64 no more of the neurons at once than fit into the memory that the FFN itself took.
        parts = [_moments(part) for part in inputs[0].split(max(_COLUMNS // len(inputs[0]), 1), dim=1)]
        mean, moment = (np.concatenate([part[index] for part in parts]) for index in range(2))
        found = (len(inputs[0]), mean, moment)
        sums[layer] = _merge(sums[layer], found) if sums[layer][0] else found

    return collect


def _moments(hidden: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and centred second moment of each column of [N, F], in float64."""
    hidden = hidden.double()
    mean = hidden.mean(0)
    return mean.cpu().numpy(), (hidden - mean).square_().sum(0).cpu().numpy()


def _column_norms(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    columns = weight.double()
    return columns.norm(dim=0).cpu().numpy(), columns.abs().mean(0).cpu().numpy()
