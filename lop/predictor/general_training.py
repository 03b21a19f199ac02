"""How the predictor for models that it has never seen learns from those that were measured."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lop.errors import LopError
from lop.predictor.curves import PLAIN, Rule
from lop.predictor.direct_training import Lesson, fit_direct
from lop.predictor.ensemble import BLUR, SIZE, WIDTH, Ensemble
from lop.predictor.general import WRITERS, Arrays, General, layer_inputs, point_inputs
from lop.predictor.training import Pair
from lop.space.features import PRUNED, Features

# Below this, in nats, a damage is rounding.
_FLOOR = 1e-5
# As many rows as a member counts in a regression, however deep it is: a curve's points say much the same.
_ROWS = 12
_RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class Measured:
    """A model to learn from.

    Attributes:
        damages: [L, 9] in nats, of each layer alone at `PRUNED`; NaN where it was not measured.
        pairs: targets with allocations that its own search found good for them; none if it was not searched.
    """

    name: str
    features: Features
    damages: np.ndarray
    pairs: tuple[Pair, ...] = ()

    @property
    def is_measured(self) -> bool:
        """Whether the damage of some layer is known."""
        return bool(np.isfinite(self.damages).any())

    @property
    def logs(self) -> np.ndarray:
        """[L, 9] log damages; NaN where there is none above rounding."""
        damages = np.where(np.isnan(self.damages), 0.0, self.damages)
        return np.log(damages, where=damages > _FLOOR, out=np.full(damages.shape, np.nan))

    @property
    def corrections(self) -> np.ndarray:
        """[L, 9] by how much the second order was wrong."""
        return self.logs - self.features.curve("fisher")


def fit_general(
    kind: str, members: Sequence[Measured], *, strength: float | None = None, rule: Rule = PLAIN, seed: int = 0
) -> General:
    """Trains a predictor of a kind; its intervals are as wide as leaving out each of its members in turn says.

    Args:
        members: of which those are learned from that the kind can learn from.
        strength: of what keeps weights small; by default the kind's own.

    Raises:
        LopError: there are fewer than three members to learn from.
    """
    known = [member for member in members if _teaches(kind, member)]
    if len(known) < 3:
        raise LopError(f"{len(known)} models to learn from: to leave one out takes three")
    left_out = [_general(kind, _but(known, member), strength, seed) for member in known]
    return _scaled(replace(_general(kind, known, strength, seed), rule=rule), known, left_out)


def leave_one_out(
    kind: str, members: Sequence[Measured], *, strength: float | None = None, rule: Rule = PLAIN, seed: int = 0
) -> dict[str, General]:
    """For each member a predictor that learned from all others, its intervals as wide as the others say.

    Raises:
        LopError: there is no other to learn from.
    """
    left_out = [_general(kind, _but(members, member), strength, seed) for member in members]
    found = {}
    for index, (member, general) in enumerate(zip(members, left_out)):
        others = [*left_out[:index], *left_out[index + 1 :]]
        found[member.name] = _scaled(replace(general, rule=rule), _but(members, member), others)
    return found


def _general(kind: str, members: Sequence[Measured], strength: float | None, seed: int) -> General:
    known = [member for member in members if _teaches(kind, member)]
    if not known:
        raise LopError(f"{kind} has no model to learn from")
    given = members if kind in WRITERS else known
    arrays = FITS[kind](given, STRENGTHS[kind] if strength is None else strength, seed)
    return General(kind, arrays, PLAIN, tuple(member.name for member in known))


def _teaches(kind: str, member: Measured) -> bool:
    return bool(member.pairs) if kind in WRITERS else member.is_measured


def _but(members: Sequence[Measured], left_out: Measured) -> list[Measured]:
    return [member for member in members if member is not left_out]


def _scaled(general: General, members: Sequence[Measured], left_out: Sequence[General]) -> General:
    """With variances scaled by how much the squared errors of left-out members exceed theirs, at each of `PRUNED`."""
    ratios = []
    for member, other in zip(members, left_out):
        if member.is_measured:
            found = other.curves(member.features)
            ratios.append(((member.logs - found.mean) / found.deviation) ** 2)
    with warnings.catch_warnings():  # Of some members nothing was measured at some shares.
        warnings.simplefilter("ignore", RuntimeWarning)
        noise = np.nanmean([np.nanmean(ratio, axis=0) for ratio in ratios], axis=0)
    noise = np.where(np.isnan(noise), np.nanmax(noise), noise)
    return replace(general, arrays={**general.arrays, "noise": general.arrays["noise"] * noise})


def _second_order(members: Sequence[Measured], strength: float, seed: int) -> Arrays:
    shift = np.nanmean(np.concatenate([member.corrections for member in members]), axis=0)
    return {"shift": shift, "noise": np.ones(len(PRUNED))}


def _ridge(members: Sequence[Measured], strength: float, seed: int) -> Arrays:
    """Without a strength, of the one that leaving out each member in turn finds best."""
    return _regress(members, strength or _best_ridge(members))


def _best_ridge(members: Sequence[Measured]) -> float:
    errors = {}
    for strength in _RIDGES:
        found = []
        for member in members:
            curves = General("ridge", _regress(_but(members, member), strength), PLAIN, ()).curves(member.features)
            found.append(np.nanmean((member.logs - curves.mean) ** 2))
        errors[strength] = float(np.mean(found))
    return min(errors, key=errors.__getitem__)


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


def _direct(members: Sequence[Measured], strength: float, seed: int) -> Arrays:
    """What writes ratios, by those that were searched, and second order's curves, by those that were measured."""
    curves = _second_order([member for member in members if member.is_measured], strength, seed)
    lessons = [Lesson(member.features, member.pairs) for member in members if member.pairs]
    return {**curves, **fit_direct(lessons, strength, seed)}


class CurveNetwork(Ensemble):
    """Each layer's inputs, and through attention all others', to its corrections and the logarithms of their variances.

    Untrained, they correct nothing. Their arrays are what `lop.predictor.general` takes.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        sizes = {
            "enter": (inputs, WIDTH),
            "qkv": (WIDTH, 3 * WIDTH),
            "mix": (WIDTH, WIDTH),
            "inner": (WIDTH, WIDTH),
            "out": (WIDTH, 2 * outputs),
        }
        super().__init__(sizes)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return (
            torch.einsum("eor,embr->embo", self.weights[f"{name}/weight"], x) + self.weights[f"{name}/bias"][:, :, None]
        )

    def forward(self, x: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """[e, m, L, inputs] of m models, and which layers they have [m, L], to means and log variances [e, m, L, 9]."""
        hidden = self._linear("enter", x)
        query, key, value = self._linear("qkv", hidden).chunk(3, dim=-1)
        scores = query @ key.transpose(-1, -2) / WIDTH**0.5
        weights = scores.masked_fill(~there[None, :, None], -torch.inf).softmax(-1)
        hidden = hidden + self._linear("mix", weights @ value)
        found = self._linear("out", torch.tanh(self._linear("inner", torch.tanh(hidden))))
        mean, log = found.chunk(2, dim=-1)
        return mean, log.clamp(-6, 4)


def _attention(members: Sequence[Measured], strength: float, seed: int) -> Arrays:
    inputs = [layer_inputs(member.features) for member in members]
    rows = np.concatenate(inputs)
    centre, scale = rows.mean(0), rows.std(0) + 1e-6
    depth = max(map(len, inputs))
    x = torch.zeros(len(members), depth, rows.shape[1])
    y = torch.full((len(members), depth, len(PRUNED)), torch.nan)
    for index, (found, member) in enumerate(zip(inputs, members)):
        x[index, : len(found)] = torch.from_numpy(((found - centre) / scale).clip(-4, 4))
        y[index, : len(found)] = torch.from_numpy(member.corrections)
    there = torch.arange(depth) < torch.tensor([len(found) for found in inputs])[:, None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CurveNetwork(x.shape[-1], len(PRUNED))
        _train(network, x, y, there, strength)
    return {"centre": centre, "scale": scale, "noise": np.ones(len(PRUNED)), **network.arrays()}


def _train(network: CurveNetwork, x: Tensor, y: Tensor, there: Tensor, decay: float) -> None:
    """By the likelihood of what was measured, models counting alike; inputs are blurred."""
    known = ~y.isnan()
    weights = known / known.sum((1, 2), keepdim=True) / len(y)
    target = y.nan_to_num()

    def loss() -> Tensor:
        mean, log = network(x + BLUR * torch.randn(SIZE, *x.shape), there)
        return (weights * ((target - mean).square() * torch.exp(-log) + log)).sum((1, 2, 3)).sum()

    network.learn(loss, decay)


# From members, the strength of what keeps weights small, and a seed.
FITS: dict[str, Callable[[Sequence[Measured], float, int], Arrays]] = {
    "second-order": _second_order,
    "ridge": _ridge,
    "attention": _attention,
    "direct": _direct,
}
# Unless another is asked for; 0 where there is none, or where the kind finds it.
STRENGTHS = {"second-order": 0.0, "ridge": 0.0, "attention": 0.1, "direct": 3.0}
