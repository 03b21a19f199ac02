"""The predictors of LOP (4.3 and A.1): from a target ratio to each layer's pruning ratio."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from lop.allocation import Allocation, Space, project
from lop.errors import LopError
from lop.files import atomic_folder, read_json, write_json
from lop.size import ModelSize

_DIMENSION = 128
_HEADS = 4
_ENCODER_LAYERS = 2


class Architecture(Protocol):
    """What all three networks offer."""

    def __call__(self, targets: Tensor, ratios: Tensor) -> Tensor:
        """[B] targets to [B, L] ratios; the given ratios [B, L] are those of the layers before (teacher forcing)."""

    def predict(self, target: Tensor) -> Tensor:
        """[1] target to [1, L] ratios."""


class Mlp(nn.Module):
    """Two hidden layers with ReLU, and a sigmoid."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, _DIMENSION), nn.ReLU(), nn.Linear(_DIMENSION, _DIMENSION), nn.ReLU())
        self.out = _near_uniform(_DIMENSION, layers)

    def forward(self, targets: Tensor, ratios: Tensor) -> Tensor:
        """[B] to [B, L]; the given ratios are not looked at."""
        return _squash(self.out(self.body(targets[:, None])), targets)

    def predict(self, target: Tensor) -> Tensor:
        """[1] to [1, L]."""
        return self(target, target)


class BiLstm(nn.Module):
    """The projected target, repeated for each layer, through a bidirectional LSTM."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self.project = nn.Linear(1, _DIMENSION)
        self.lstm = nn.LSTM(_DIMENSION, _DIMENSION // 2, batch_first=True, bidirectional=True)
        self.out = _near_uniform(_DIMENSION, 1)

    def forward(self, targets: Tensor, ratios: Tensor) -> Tensor:
        """[B] to [B, L]; the given ratios are not looked at."""
        steps = self.project(targets[:, None])[:, None].expand(-1, self.layers, -1)
        return _squash(self.out(self.lstm(steps)[0])[..., 0], targets)

    def predict(self, target: Tensor) -> Tensor:
        """[1] to [1, L]."""
        return self(target, target)


class ArTransformer(nn.Module):
    """Layer after layer: step l sees the target and `p_1 … p_{l−1}`.

    The token of step l is the embedded target plus the embedded ratio of the layer before (zero for the first) plus
    the learned embedding of layer l; two causal pre-norm encoder layers follow.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self.target = nn.Sequential(nn.Linear(1, _DIMENSION), nn.ReLU(), nn.Linear(_DIMENSION, _DIMENSION))
        self.ratio = nn.Linear(1, _DIMENSION, bias=False)
        self.position = nn.Parameter(torch.randn(layers, _DIMENSION) * 0.02)
        self.blocks = nn.ModuleList(_Block() for _ in range(_ENCODER_LAYERS))
        self.norm = nn.LayerNorm(_DIMENSION)
        self.out = _near_uniform(_DIMENSION, 1)

    def forward(self, targets: Tensor, ratios: Tensor) -> Tensor:
        """[B] and the true ratios [B, L] to [B, L]: each layer's from those before it (teacher forcing)."""
        before = F.pad(ratios[:, :-1], (1, 0))
        x = self.target(targets[:, None])[:, None] + self.ratio(before[..., None]) + self.position
        for block in self.blocks:
            x, _ = block(x, None)
        return _squash(self.out(self.norm(x))[..., 0], targets)

    def predict(self, target: Tensor) -> Tensor:
        """[1] to [1, L], each ratio fed back into the next step; keys and values of earlier steps are kept."""
        embedded = self.target(target[:, None])
        caches: list[Tensor | None] = [None] * len(self.blocks)
        ratio = torch.zeros(1, 1)
        found = []
        for layer in range(self.layers):
            x = (embedded + self.ratio(ratio) + self.position[layer])[:, None]
            for index, block in enumerate(self.blocks):
                x, caches[index] = block(x, caches[index])
            ratio = _squash(self.out(self.norm(x))[:, 0], target)
            found.append(ratio)
        return torch.cat(found, dim=1)


class _Block(nn.Module):
    """One causal encoder layer: self-attention and a GELU network four times as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(_DIMENSION)
        self.qkv = nn.Linear(_DIMENSION, 3 * _DIMENSION)
        self.mix = nn.Linear(_DIMENSION, _DIMENSION)
        self.before_ffn = nn.LayerNorm(_DIMENSION)
        self.ffn = nn.Sequential(
            nn.Linear(_DIMENSION, 4 * _DIMENSION), nn.GELU(), nn.Linear(4 * _DIMENSION, _DIMENSION)
        )

    def forward(self, x: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, T, d] to the same, and the keys and values [2, B, heads, t, d/heads] of all steps so far."""
        batch, steps, _ = x.shape
        qkv = self.qkv(self.before_attention(x)).view(batch, steps, 3, _HEADS, -1).permute(2, 0, 3, 1, 4)
        queries, memory = qkv[0], qkv[1:]
        if cache is not None:
            memory = torch.cat([cache, memory], dim=3)
        attended = F.scaled_dot_product_attention(queries, memory[0], memory[1], is_causal=cache is None)
        x = x + self.mix(attended.transpose(1, 2).reshape(batch, steps, -1))
        return x + self.ffn(self.before_ffn(x)), memory


ARCHITECTURES: dict[str, type[nn.Module]] = {"mlp": Mlp, "lstm": BiLstm, "transformer": ArTransformer}


def build(architecture: str, layers: int) -> nn.Module:
    """An untrained network of a named architecture.

    Raises:
        LopError: no architecture has that name.
    """
    if architecture not in ARCHITECTURES:
        raise LopError(f"architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture](layers)


@dataclass(frozen=True)
class Predictor:
    """A trained network with all that turns a target into an allocation: no model is needed.

    Attributes:
        architecture: a name of `ARCHITECTURES`.
        weights: the network's parameters by name.
        space: the allocations of the model that it was trained for.
        size: the dense model's numbers.
        fingerprints: what the predictor was made from.
    """

    architecture: str
    weights: Mapping[str, Tensor]
    space: Space
    size: ModelSize
    fingerprints: Mapping[str, str]

    @cached_property
    def _network(self) -> nn.Module:
        network = build(self.architecture, self.space.layers)
        network.load_state_dict(dict(self.weights))
        return network.eval().requires_grad_(False)

    @torch.inference_mode()
    def ratios(self, target: float) -> np.ndarray:
        """[L] the network's pruning ratios, before they are projected onto the budget."""
        predicted = cast(Architecture, self._network).predict(torch.tensor([target], dtype=torch.float32))
        return predicted[0].double().numpy()

    def allocate(self, budget: int) -> Allocation:
        """The allocation of exactly `budget` neurons nearest to what the network predicts."""
        return project(self.ratios(self.space.ratio(budget)), self.space, budget)

    def save(self, folder: Path) -> None:
        """Writes `predictor.json` and `weights.safetensors` into a new folder."""
        data = save({name: tensor.contiguous() for name, tensor in self.weights.items()})
        about = {
            "architecture": self.architecture,
            "space": asdict(self.space),
            "size": asdict(self.size),
            "fingerprints": dict(self.fingerprints),
            "weights": hashlib.sha256(data).hexdigest(),
        }
        with atomic_folder(folder) as temporary:
            (temporary / "weights.safetensors").write_bytes(data)
            write_json(temporary / "predictor.json", about)


def load_predictor(folder: Path) -> Predictor:
    """Reads what `Predictor.save` wrote.

    Raises:
        LopError: a file is missing or damaged.
    """
    if not folder.is_dir():
        raise LopError(f"{folder} is missing: run `lop train` first")
    about: dict[str, Any] = read_json(folder / "predictor.json")
    try:
        data = (folder / "weights.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != about["weights"]:
            raise LopError(f"{folder} is damaged: weights.safetensors is not what was written (SHA-256 differs)")
        return Predictor(
            architecture=about["architecture"],
            weights=load(data),
            space=Space(**about["space"]),
            size=ModelSize(**about["size"]),
            fingerprints=about["fingerprints"],
        )
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise LopError(f"{folder} is damaged: {error}") from None


def _near_uniform(inputs: int, outputs: int) -> nn.Linear:
    """A last layer of zeros: an untrained network answers the target itself for every layer."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _squash(outputs: Tensor, targets: Tensor) -> Tensor:
    """Sigmoid around the target: the network learns in which direction a layer differs from uniform, as log-odds."""
    return torch.sigmoid(outputs + torch.logit(targets.clamp(0.01, 0.99))[:, None])
