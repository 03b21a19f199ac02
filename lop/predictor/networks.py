"""The predictors' networks as they are trained (LOP 4.3 and A.1); `lop.predictor.inference` is how they answer.

They are the paper's, but for where they start: the sigmoid's argument is the target's log-odds plus what the network
says, whose last layer begins at zero. An untrained network thus answers the uniform allocation, training learns how
layers differ from it, and a dozen pairs from a noisy search suffice for a smooth function of the target.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lop.errors import LopError
from lop.predictor.inference import DIMENSION, ENCODER_LAYERS, HEADS


class Mlp(nn.Module):
    """Two hidden layers with ReLU, and a sigmoid."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, DIMENSION), nn.ReLU(), nn.Linear(DIMENSION, DIMENSION), nn.ReLU())
        self.out = _near_uniform(DIMENSION, layers)

    def forward(self, targets: Tensor, ratios: Tensor) -> Tensor:
        """[B] to [B, L]; the given ratios are not looked at."""
        return torch.sigmoid(self.out(self.body(targets[:, None])) + _log_odds(targets))


class BiLstm(nn.Module):
    """The projected target, repeated for each layer, through a bidirectional LSTM."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self.project = nn.Linear(1, DIMENSION)
        self.lstm = nn.LSTM(DIMENSION, DIMENSION // 2, batch_first=True, bidirectional=True)
        self.out = _near_uniform(DIMENSION, 1)

    def forward(self, targets: Tensor, ratios: Tensor) -> Tensor:
        """[B] to [B, L]; the given ratios are not looked at."""
        steps = self.project(targets[:, None])[:, None].expand(-1, self.layers, -1)
        return torch.sigmoid(self.out(self.lstm(steps)[0])[..., 0] + _log_odds(targets))


class ArTransformer(nn.Module):
    """Layer after layer: step l sees the target and `p_1 … p_{l−1}`.

    The token of step l is the embedded target plus the embedded ratio of the layer before (zero for the first) plus
    the learned embedding of layer l; two causal pre-norm encoder layers follow.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self.target = nn.Sequential(nn.Linear(1, DIMENSION), nn.ReLU(), nn.Linear(DIMENSION, DIMENSION))
        self.ratio = nn.Linear(1, DIMENSION, bias=False)
        self.position = nn.Parameter(torch.randn(layers, DIMENSION) * 0.02)
        self.blocks = nn.ModuleList(_Block() for _ in range(ENCODER_LAYERS))
        self.norm = nn.LayerNorm(DIMENSION)
        self.out = _near_uniform(DIMENSION, 1)

    def forward(self, targets: Tensor, ratios: Tensor) -> Tensor:
        """[B] and the true ratios [B, L] to [B, L]: each layer's from those before it (teacher forcing)."""
        before = F.pad(ratios[:, :-1], (1, 0))
        x = self.target(targets[:, None])[:, None] + self.ratio(before[..., None]) + self.position
        for block in self.blocks:
            x = block(x)
        return torch.sigmoid(self.out(self.norm(x))[..., 0] + _log_odds(targets))


class _Block(nn.Module):
    """One causal encoder layer: self-attention and a GELU network four times as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(DIMENSION)
        self.qkv = nn.Linear(DIMENSION, 3 * DIMENSION)
        self.mix = nn.Linear(DIMENSION, DIMENSION)
        self.before_ffn = nn.LayerNorm(DIMENSION)
        self.ffn = nn.Sequential(nn.Linear(DIMENSION, 4 * DIMENSION), nn.GELU(), nn.Linear(4 * DIMENSION, DIMENSION))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] to the same; each step attends to itself and those before it."""
        batch, steps, _ = x.shape
        qkv = self.qkv(self.before_attention(x)).view(batch, steps, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).reshape(batch, steps, -1))
        return x + self.ffn(self.before_ffn(x))


ARCHITECTURES: dict[str, type[nn.Module]] = {"mlp": Mlp, "lstm": BiLstm, "transformer": ArTransformer}


def build(architecture: str, layers: int) -> nn.Module:
    """An untrained network of a named architecture.

    Raises:
        LopError: no architecture has that name.
    """
    if architecture not in ARCHITECTURES:
        raise LopError(f"architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture](layers)


def weights_of(network: nn.Module) -> dict[str, np.ndarray]:
    """A copy of a network's weights by name, as `lop.predictor.inference` takes them."""
    return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}


def _near_uniform(inputs: int, outputs: int) -> nn.Linear:
    """A last layer of zeros: an untrained network answers the target itself for every layer."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _log_odds(targets: Tensor) -> Tensor:
    """[B] to [B, 1]: see `lop.predictor.inference`."""
    return torch.logit(targets.clamp(0.01, 0.99))[:, None]
