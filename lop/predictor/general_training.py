"""How the predictor for models that it has never seen learns from those that were measured."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from lop.errors import LopError
from lop.predictor.curves import PLAIN, Curves, Rule
from lop.predictor.general import Arrays, General, layer_inputs, point_inputs
from lop.space.features import PRUNED, Features

# Below this, in nats, a damage is rounding.
_FLOOR = 1e-5
# As many rows as a member counts in a regression, however deep it is: a curve's points say much the same.
_ROWS = 12
_RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_ENSEMBLE, _WIDTH, _EPOCHS, _RATE, _DECAY, _BLUR = 5, 16, 200, 5e-3, 0.1, 0.2


@dataclass(frozen=True)
class Measured:
    """A model to learn from.

    Attributes:
        damages: [L, 9] in nats, of each layer alone at `PRUNED`; NaN where it was not measured.
    """

    name: str
    features: Features
    damages: np.ndarray

    @property
    def logs(self) -> np.ndarray:
        """[L, 9] log damages; NaN where there is none above rounding."""
        damages = np.where(np.isnan(self.damages), 0.0, self.damages)
        return np.log(damages, where=damages > _FLOOR, out=np.full(damages.shape, np.nan))

    @property
    def corrections(self) -> np.ndarray:
        """[L, 9] by how much the second order was wrong."""
        return self.logs - self.features.curve("fisher")


def fit_general(kind: str, members: Sequence[Measured], *, rule: Rule = PLAIN, seed: int = 0) -> General:
    """Trains a predictor of a kind; its intervals are as wide as leaving out each of its members in turn says.

    Raises:
        LopError: there are fewer than three members.
    """
    if len(members) < 3:
        raise LopError(f"{len(members)} models to learn from: to leave one out takes three")
    arrays = FITS[kind](members, seed)(members)
    noise = _noise(members, _left_out(kind, members, seed))
    names = tuple(member.name for member in members)
    return General(kind, {**arrays, "noise": arrays["noise"] * noise}, rule, names)


def leave_one_out(kind: str, members: Sequence[Measured], *, seed: int = 0) -> dict[str, Curves]:
    """What a predictor trained on all others expects of each member, its intervals as wide as the others say."""
    found, curves = {}, _left_out(kind, members, seed)
    for index, member in enumerate(members):
        rest = [*range(index), *range(index + 1, len(members))]
        noise = _noise([members[i] for i in rest], [curves[i] for i in rest])
        found[member.name] = replace(curves[index], deviation=curves[index].deviation * np.sqrt(noise))
    return found


def _left_out(kind: str, members: Sequence[Measured], seed: int) -> list[Curves]:
    """Each member's curves by a predictor that has not seen it, before its intervals are scaled."""
    found = []
    for index, member in enumerate(members):
        others = [*members[:index], *members[index + 1 :]]
        found.append(General(kind, FITS[kind](others, seed)(others), PLAIN, ()).curves(member.features))
    return found


def _noise(members: Sequence[Measured], curves: Sequence[Curves]) -> np.ndarray:
    """[9] by how much the squared errors of left-out members exceed the variances, at each of `PRUNED`."""
    ratios = [((member.logs - found.mean) / found.deviation) ** 2 for member, found in zip(members, curves)]
    with warnings.catch_warnings():  # Of some members nothing was measured at some shares.
        warnings.simplefilter("ignore", RuntimeWarning)
        noise = np.nanmean([np.nanmean(ratio, axis=0) for ratio in ratios], axis=0)
    return np.where(np.isnan(noise), np.nanmax(noise), noise)


Fit = Callable[[Sequence[Measured]], Arrays]


def _shift(members: Sequence[Measured], seed: int) -> Fit:
    def fit(chosen: Sequence[Measured]) -> Arrays:
        rows = [member.corrections for member in chosen]
        shift = np.nanmean(np.concatenate(rows), axis=0)
        return {"shift": shift, "noise": np.ones(len(PRUNED))}

    return fit


def _ridge(members: Sequence[Measured], seed: int) -> Fit:
    """Of the strength that leaving out each member in turn finds best."""
    errors = {}
    for strength in _RIDGES:
        found = []
        for index, member in enumerate(members):
            arrays = _regress([*members[:index], *members[index + 1 :]], strength)
            curves = General("ridge", arrays, PLAIN, ()).curves(member.features)
            found.append(np.nanmean((member.logs - curves.mean) ** 2))
        errors[strength] = float(np.mean(found))
    best = min(errors, key=errors.__getitem__)
    return lambda chosen: _regress(chosen, best)


def _regress(members: Sequence[Measured], strength: float) -> Arrays:
    inputs = [point_inputs(member.features) for member in members]
    rows = np.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs])
    centre, scale = rows.mean(0), rows.std(0) + 1e-6
    size = rows.shape[1] + 1
    gram, sums = np.zeros((size, size)), np.zeros(size)
    for x, member in zip(inputs, members):
        known = ~np.isnan(member.corrections)
        scaled = ((x[known] - centre) / scale).clip(-4, 4)
        scaled = np.concatenate([np.ones((len(scaled), 1)), scaled], axis=1)
        weight = _ROWS / len(scaled)
        gram += weight * scaled.T @ scaled
        sums += weight * scaled.T @ member.corrections[known]
    penalty = strength * np.eye(size)
    penalty[0, 0] = 0.1
    covariance = np.linalg.inv(gram + penalty)
    return {
        "centre": centre,
        "scale": scale,
        "covariance": covariance,
        "weights": covariance @ sums,
        "noise": np.ones(len(PRUNED)),
    }


class CurveNetwork(nn.Module):
    """Each layer's inputs, and through attention all others', to its corrections and the logarithms of their variances.

    An ensemble of them is computed at once: all weights have a first dimension for its members. The last layer starts
    at zero: untrained, it corrects nothing.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        sizes = {
            "enter": (inputs, _WIDTH),
            "qkv": (_WIDTH, 3 * _WIDTH),
            "mix": (_WIDTH, _WIDTH),
            "inner": (_WIDTH, _WIDTH),
            "out": (_WIDTH, 2 * outputs),
        }
        self.weights = nn.ParameterDict()
        for name, (rows, columns) in sizes.items():
            scale = 0.0 if name == "out" else rows**-0.5
            self.weights[f"{name}/weight"] = nn.Parameter(torch.randn(_ENSEMBLE, columns, rows) * scale)
            self.weights[f"{name}/bias"] = nn.Parameter(torch.zeros(_ENSEMBLE, 1, columns))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return (
            torch.einsum("eor,embr->embo", self.weights[f"{name}/weight"], x) + self.weights[f"{name}/bias"][:, :, None]
        )

    def forward(self, x: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """[e, m, L, inputs] of m models, and which layers they have [m, L], to means and log variances [e, m, L, 9]."""
        hidden = self._linear("enter", x)
        query, key, value = self._linear("qkv", hidden).chunk(3, dim=-1)
        scores = query @ key.transpose(-1, -2) / _WIDTH**0.5
        weights = scores.masked_fill(~there[None, :, None], -torch.inf).softmax(-1)
        hidden = hidden + self._linear("mix", weights @ value)
        found = self._linear("out", torch.tanh(self._linear("inner", torch.tanh(hidden))))
        mean, log = found.chunk(2, dim=-1)
        return mean, log.clamp(-6, 4)

    def arrays(self) -> dict[str, np.ndarray]:
        """As `lop.predictor.general` takes them."""
        found = {name.replace("/", "."): weight.detach().double().numpy() for name, weight in self.weights.items()}
        return {name: array[:, 0] if name.endswith("bias") else array for name, array in found.items()}


def _attention(members: Sequence[Measured], seed: int) -> Fit:
    def fit(chosen: Sequence[Measured]) -> Arrays:
        inputs = [layer_inputs(member.features) for member in chosen]
        rows = np.concatenate(inputs)
        centre, scale = rows.mean(0), rows.std(0) + 1e-6
        depth = max(map(len, inputs))
        x = torch.zeros(len(chosen), depth, rows.shape[1])
        y = torch.full((len(chosen), depth, len(PRUNED)), torch.nan)
        for index, (found, member) in enumerate(zip(inputs, chosen)):
            x[index, : len(found)] = torch.from_numpy(((found - centre) / scale).clip(-4, 4))
            y[index, : len(found)] = torch.from_numpy(member.corrections)
        there = torch.arange(depth) < torch.tensor([len(found) for found in inputs])[:, None]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _trained(CurveNetwork(x.shape[-1], len(PRUNED)), x, y, there)
        return {"centre": centre, "scale": scale, "noise": np.ones(len(PRUNED)), **network.arrays()}

    return fit


def _trained(network: CurveNetwork, x: Tensor, y: Tensor, there: Tensor) -> CurveNetwork:
    """By the likelihood of what was measured, models counting alike; inputs are blurred against learning by heart."""
    known = ~y.isnan()
    weights = known / known.sum((1, 2), keepdim=True) / len(y)
    target = y.nan_to_num()
    optimiser = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _EPOCHS)
    for _ in range(_EPOCHS):
        mean, log = network(x + _BLUR * torch.randn(_ENSEMBLE, *x.shape), there)
        loss = (weights * ((target - mean).square() * torch.exp(-log) + log)).sum((1, 2, 3)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network


# From all models at hand, to choose settings with, and a seed to what trains on some of them.
FITS: dict[str, Callable[[Sequence[Measured], int], Fit]] = {
    "second-order": _shift,
    "ridge": _ridge,
    "attention": _attention,
}
