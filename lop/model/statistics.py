"""What one pass over the calibration samples learns of every FFN neuron."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lop.errors import LopError
from lop.model.adapter import QwenVL
from lop.model.backbone import Backbone, SeeHeads
from lop.model.encoding import Encoded, on_device
from lop.storage.files import atomic_file, disk_errors
from lop.storage.fingerprint import check_fingerprints

_FIELDS = ("count", "mean", "moment", "down_l2", "down_l1")
_GROUPS = "groups"
_SECONDS = "seconds"
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
        groups: [L, K], float64, of each group of attention heads `Σ ‖W_o·a‖²` over the tokens, of what it adds to the
            residual stream; None where attention was not looked at.
        exponents: [L], float64, the tail exponents of the layers' spectra, for the one baseline that reads them
            (`lop.run.surveys.statistics_for`); no part of what is saved.
        surveys: by name what further passes over the samples found, for the methods that read it
            (`lop.run.surveys`); no part of what is saved.
    """

    count: int
    mean: np.ndarray
    moment: np.ndarray
    down_l2: np.ndarray
    down_l1: np.ndarray
    groups: np.ndarray | None = None
    exponents: np.ndarray | None = None
    surveys: Mapping[str, np.ndarray] = field(default_factory=dict)

    def surveyed(self, name: str) -> np.ndarray:
        """What a survey found.

        Raises:
            LopError: it has not been made.
        """
        if name not in self.surveys:
            raise LopError(f"these statistics lack {name!r}, which a survey finds (`lop.run.surveys`)")
        return self.surveys[name]

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
        groups = None if self.groups is None or other.groups is None else self.groups + other.groups
        return NeuronStatistics(*sums, self.down_l2, self.down_l1, groups)

    def save(self, path: Path, fingerprints: Mapping[str, str]) -> None:
        """Writes a safetensors file whose metadata names what the statistics were made from."""
        arrays = {name: np.asarray(getattr(self, name)) for name in _FIELDS}
        if self.groups is not None:
            arrays[_GROUPS] = self.groups
        _save(path, arrays, fingerprints)


def load_statistics(path: Path) -> tuple[NeuronStatistics, dict[str, str]]:
    """Reads statistics and the fingerprints they were saved with.

    Raises:
        LopError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            there = file.keys()
            arrays = {name: file.get_tensor(name) for name in (*_FIELDS, *({_GROUPS} & set(there)))}
            return NeuronStatistics(int(arrays.pop("count")), **arrays), dict(file.metadata() or {})
    except FileNotFoundError:
        raise LopError(f"{path} is missing: run `lop calibrate` first") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise LopError(f"{path} is damaged: {error}") from None


def save_survey(
    path: Path, arrays: Mapping[str, np.ndarray], fingerprints: Mapping[str, str], *, seconds: float
) -> None:
    """Writes what a survey found, with what it was made from and the seconds that it took."""
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    _save(path, whole, {**fingerprints, _SECONDS: repr(seconds)})


def load_survey(path: Path, fingerprints: Mapping[str, str]) -> tuple[dict[str, np.ndarray], float]:
    """What a survey found, and the seconds that it took.

    Raises:
        LopError: the file is missing or damaged, or was made from something else.
    """
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
        seconds = float(metadata.pop(_SECONDS))
    except FileNotFoundError:
        raise LopError(
            f"{path} is missing: `lop compare`, `lop rivals` and `lop calibrate` make what their methods need"
        ) from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise LopError(f"{path} is damaged: {error}") from None
    check_fingerprints(str(path), metadata, fingerprints)
    return arrays, seconds


def _save(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    with atomic_file(path) as temporary, disk_errors(path):
        save_file(dict(arrays), temporary, metadata=dict(metadata))


@torch.inference_mode()
def calibrate(model: QwenVL, encoded: Encoded, *, attention: bool = False, progress: bool = False) -> NeuronStatistics:
    """Collects the statistics of the dense model in one pass, without any padding.

    Each batch is summed in float64 and merged exactly, so batch sizes and order change no more than rounding.

    Args:
        attention: looks at the groups of attention, too.
    """
    layers = len(model.ffns)
    norms = [_column_norms(ffn.down_proj.weight) for ffn in model.ffns]
    down_l2, down_l1 = (np.stack([pair[index] for pair in norms]) for index in range(2))
    backbone = model.lean_backbone()
    total: NeuronStatistics | None = None
    for batch in tqdm(
        on_device(encoded.batches, model.device),
        desc="calibrate",
        unit="batch",
        total=len(encoded.batches),
        disable=not progress,
    ):
        sums: list[_Sums] = [(0, np.empty(0), np.empty(0))] * layers
        added: list[np.ndarray] = []
        see = _group_collector(backbone, added) if attention else None
        hooks = [
            ffn.down_proj.register_forward_pre_hook(_collector(sums, layer)) for layer, ffn in enumerate(model.ffns)
        ]
        try:
            for _ in backbone.hidden(batch.embeddings, batch.rotation, batch.groups, see=see):
                pass  # The hooks see what there is to see.
        finally:
            for hook in hooks:
                hook.remove()
        mean, moment = (np.stack([found[index] for found in sums]) for index in (1, 2))
        part = NeuronStatistics(len(batch), mean, moment, down_l2, down_l1, np.stack(added) if added else None)
        total = part if total is None else total.merge(part)
    assert total is not None
    return total


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


def _group_collector(backbone: Backbone, added: list[np.ndarray]) -> SeeHeads:
    """What adds to a list, layer after layer, [K] the squares of what each group says through `o_proj`."""

    def collect(said: Tensor) -> None:
        heads = backbone.layers[len(added)].heads
        parts = zip(said.chunk(heads.groups, dim=1), heads.out.chunk(heads.groups, dim=1))
        added.append(np.array([float(F.linear(one, out).double().square().sum()) for one, out in parts]))

    return collect


def _moments(hidden: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and centred second moment of each column of [N, F], in float64."""
    hidden = hidden.double()
    mean = hidden.mean(0)
    return mean.cpu().numpy(), (hidden - mean).square_().sum(0).cpu().numpy()


def _column_norms(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    columns = weight.double()
    return columns.norm(dim=0).cpu().numpy(), columns.abs().mean(0).cpu().numpy()
