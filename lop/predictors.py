"""The predictors of LOP (4.3 and A.1): from a target ratio to each layer's pruning ratio.

The three networks are the paper's, but for where they start: the sigmoid's argument is the target's log-odds plus what
the network says, whose last layer begins at zero. An untrained network thus answers the uniform allocation, training
learns how layers differ from it, and a dozen pairs from a noisy search suffice for a smooth function of the target.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
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
from lop.fingerprint import fingerprint
from lop.size import ModelSize

_DIMENSION = 128
_HEADS = 4
_ENCODER_LAYERS = 2
_NETWORK = {"dimension": _DIMENSION, "heads": _HEADS, "encoder_layers": _ENCODER_LAYERS}


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
        return torch.sigmoid(self.out(self.body(targets[:, None])) + _log_odds(targets))

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
        return torch.sigmoid(self.out(self.lstm(steps)[0])[..., 0] + _log_odds(targets))

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
            x = block(x)
        return torch.sigmoid(self.out(self.norm(x))[..., 0] + _log_odds(targets))

    def predict(self, target: Tensor) -> Tensor:
        """[1] to [1, L], each ratio fed back into the next step; keys and values of earlier steps are kept."""
        tokens = (self.target(target[:, None]) + self.position).split(1)
        log_odds = _log_odds(target)
        # See `_Block.stepper` for why the loop calls no modules.
        steps = [block.stepper() for block in cast(Iterable[_Block], self.blocks)]
        feed = self.ratio.weight.T
        norm, norm_bias = self.norm.weight, self.norm.bias
        out, out_bias = self.out.weight, self.out.bias
        ratio = target.new_zeros(1, 1)
        found = []
        for token in tokens:
            x = torch.addmm(token, ratio, feed)
            for step in steps:
                x = step(x)
            x = torch.layer_norm(x, (_DIMENSION,), norm, norm_bias)
            ratio = torch.sigmoid(F.linear(x, out, out_bias) + log_odds)
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

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] to the same; each step attends to itself and those before it."""
        batch, steps, _ = x.shape
        qkv = self.qkv(self.before_attention(x)).view(batch, steps, 3, _HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).reshape(batch, steps, -1))
        return x + self.ffn(self.before_ffn(x))

    def stepper(self) -> Callable[[Tensor], Tensor]:
        """The block as a function of one step, [1, d] to [1, d], that remembers the steps it was called with before.

        It does what `forward` does. On tensors this small, calling modules and looking up their parameters takes as
        long as the arithmetic, so both are left out of the loop.
        """
        norm, norm_bias = self.before_attention.weight, self.before_attention.bias
        qkv, qkv_bias = self.qkv.weight, self.qkv.bias
        mix, mix_bias = self.mix.weight, self.mix.bias
        norm_2, norm_2_bias = self.before_ffn.weight, self.before_ffn.bias
        up, up_bias, down, down_bias = self.ffn.parameters()
        keys = values = norm.new_empty(1, _HEADS, 0, _DIMENSION // _HEADS)

        def step(x: Tensor) -> Tensor:
            nonlocal keys, values
            normed = torch.layer_norm(x, (_DIMENSION,), norm, norm_bias)
            query, key, value = F.linear(normed, qkv, qkv_bias).view(3, 1, _HEADS, 1, -1).unbind()
            keys, values = torch.cat((keys, key), 2), torch.cat((values, value), 2)
            attended = F.scaled_dot_product_attention(query, keys, values)
            x = x + F.linear(attended.view(1, _DIMENSION), mix, mix_bias)
            normed = torch.layer_norm(x, (_DIMENSION,), norm_2, norm_2_bias)
            return x + F.linear(F.gelu(F.linear(normed, up, up_bias)), down, down_bias)

        return step


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
        # Building draws weights that are overwritten at once; the process's random state is none of its business.
        with torch.random.fork_rng(devices=[]):
            network = build(self.architecture, self.space.layers)
        network.load_state_dict(dict(self.weights))
        return network.eval().requires_grad_(False)

    @torch.inference_mode()
    def ratios(self, target: float) -> np.ndarray:
        """[L] the network's pruning ratios for a target in [0, 1], before they are projected onto the budget."""
        predicted = cast(Architecture, self._network).predict(torch.tensor([target], dtype=torch.float32))
        return predicted[0].double().numpy()

    def allocate(self, budget: int) -> Allocation:
        """The allocation of exactly `budget` neurons nearest to what the network predicts.

        Raises:
            LopError: the budget is not one of the space's.
        """
        return project(self.ratios(self.space.ratio(budget)), self.space, budget)

    def save(self, folder: Path) -> None:
        """Writes `predictor.json` and `weights.safetensors` into a folder, in the place of an older predictor."""
        data = save({name: tensor.contiguous() for name, tensor in self.weights.items()})
        about = {
            "architecture": self.architecture,
            "network": _NETWORK,
            "space": asdict(self.space),
            "size": asdict(self.size),
            "fingerprints": dict(self.fingerprints),
            "weights": hashlib.sha256(data).hexdigest(),
        }
        with atomic_folder(folder, replace=True) as temporary:
            (temporary / "weights.safetensors").write_bytes(data)
            write_json(temporary / "predictor.json", {**about, "fingerprint": fingerprint(about)})


def load_predictor(folder: Path) -> Predictor:
    """Reads what `Predictor.save` wrote.

    Raises:
        LopError: a file is missing, damaged (a single flipped byte is found) or of a network that is not built here.
    """
    if not folder.is_dir():
        raise LopError(f"{folder} is missing: run `lop train` first")
    about: dict[str, Any] = read_json(folder / "predictor.json")
    try:
        if about.pop("fingerprint") != fingerprint(about):
            raise LopError(f"{folder} is damaged: predictor.json is not what was written (its fingerprint differs)")
        data = (folder / "weights.safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != about["weights"]:
            raise LopError(f"{folder} is damaged: weights.safetensors is not what was written (SHA-256 differs)")
        if about["network"] != _NETWORK:
            raise LopError(f"{folder} holds a network of {about['network']}, here it is {_NETWORK}: train it again")
        predictor = Predictor(
            architecture=about["architecture"],
            weights=load(data),
            space=Space(**about["space"]),
            size=ModelSize(**about["size"]),
            fingerprints=about["fingerprints"],
        )
        _ = predictor._network  # A network that does not fit its weights is found here, not at the first prediction.
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise LopError(f"{folder} is damaged: {' '.join(str(error).split())}") from None
    return predictor


def _near_uniform(inputs: int, outputs: int) -> nn.Linear:
    """A last layer of zeros: an untrained network answers the target itself for every layer."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _log_odds(targets: Tensor) -> Tensor:
    """[B] to [B, 1]: added to what a network says, so that it learns in which direction a layer differs from uniform.

    Clamped, as the log-odds of nothing and of everything are infinite; the projection makes up for the difference.
    """
    return torch.logit(targets.clamp(0.01, 0.99))[:, None]
