"""From a target to an allocation and to the bits of its weights: the best pair that fits, as far as it was measured."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lop.checkpoint.bits import BITS, Packing, check_bits, least_width, packing
from lop.checkpoint.footprint import Footprint
from lop.checkpoint.formats import Format
from lop.model.sources import family_of
from lop.predictor.predictor import Predictor
from lop.run.config import Config
from lop.run.prediction import predictor_for, what_ships
from lop.run.qualities import Qualities, read_qualities
from lop.run.run import Run
from lop.space.allocation import Allocation, dense
from lop.space.size import Target
from lop.storage.headers import read_tensors


@dataclass(frozen=True)
class Option:
    """What one number of bits would give.

    Attributes:
        ratio: the least pruning that fits; None if none does.
        bytes: of the checkpoint then.
        divergence: KL to the dense model to expect, in nats; None where nothing was measured so far pruned.
    """

    bits: int
    ratio: float | None = None
    bytes: int | None = None
    divergence: float | None = None

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.bits} bits: nothing fits"
        worth = "not measured so far pruned" if self.divergence is None else f"KL {self.divergence:.4f}"
        return f"{self.bits} bits, {self.ratio:.1%} pruned: {self.bytes:,} bytes, {worth}"


@dataclass(frozen=True)
class Choice:
    """The answer to a target.

    Attributes:
        predictor: whose allocation it is.
        footprint: what its checkpoint weighs.
        options: all that were weighed against each other; empty where the bits were given, or nothing was measured.
    """

    predictor: Predictor
    footprint: Footprint
    allocation: Allocation
    options: tuple[Option, ...] = ()

    @property
    def bits(self) -> int:
        """Of the weights."""
        return self.footprint.bits

    def describe(self) -> dict[str, Any]:
        """Plain JSON values; see `Footprint.describe`."""
        return self.footprint.describe(self.allocation, self.predictor.space)


def packing_of(run: Run, bits: int, *, vision: bool = False) -> Packing | None:
    """How a run's checkpoints of so many bits are quantised; None if they are not.

    Raises:
        LopError: weights cannot have so many bits, or the granularity leaves no group that divides all rows.
    """
    check_bits(bits)
    if bits == BITS[0]:
        return None
    folder = run.model_folder
    return packing(read_tensors(folder), family_of(folder), bits, granularity=run.config.granularity, vision=vision)


def footprint_of(run: Run, format: Format, recovery: str, bits: int, *, vision: bool = False) -> Footprint:
    """What a run's checkpoints come to.

    Raises:
        LopError: as `packing_of`, or the format has no place for what the recovery adds.
    """
    found = packing_of(run, bits, vision=vision)
    weight = None if found is None else found.weight(run.size, read_tensors(run.model_folder))
    return Footprint(run.size, format, recovery, weight)


def choose(
    run: Run | None,
    config: Config,
    target: Target,
    format: Format = "hf",
    *,
    bits: int | None = None,
    vision: bool = False,
) -> Choice:
    """The allocation for a target, and with a number of bytes the bits, too, where `lop measure` has been run.

    Args:
        bits: of the weights; None leaves the choice open, which is 16 where nothing was measured.

    Raises:
        LopError: the target cannot be met, or the predictor is missing or of another model.
    """
    owner, predictor = run or what_ships(config), predictor_for(run, config)
    plain = footprint_of(owner, format, config.recovery, bits or BITS[0], vision=vision)
    # Where all layers keep alike, they are not what was measured.
    is_open = bits is None and target.bytes is not None and not plain.is_uniform(target)
    qualities = read_qualities(owner) if is_open else None
    if qualities is None or qualities.recovery != config.recovery:
        return Choice(predictor, plain, plain.allocate(target, predictor.space, predictor.allocate))
    return _best(owner, predictor, plain, target, qualities, vision=vision)


def _best(
    run: Run, predictor: Predictor, plain: Footprint, target: Target, qualities: Qualities, *, vision: bool
) -> Choice:
    assert target.bytes is not None
    space = predictor.space
    if target.bytes > plain.bytes(dense(space).widths):
        plain.budget(target, space)  # Which refuses it, as ever.
    footprints = {bits: footprint_of(run, plain.format, plain.recovery, bits, vision=vision) for bits in qualities.bits}
    budgets = {bits: _budget(footprint, target, predictor) for bits, footprint in footprints.items()}
    options = tuple(_options(footprints, budgets, predictor, qualities))
    known = [option for option in options if option.divergence is not None]
    fits = known or [option for option in options if option.ratio is not None]
    # Of those that nothing is known of the one with most bits; and if none fits, the smallest says what would.
    found = min(fits, key=lambda option: option.divergence or 0.0).bits if fits else min(qualities.bits)
    budget = budgets[found]
    if budget is None:
        budget = footprints[found].budget(target, space)
    return Choice(predictor, footprints[found], predictor.allocate(budget), options)


def _budget(footprint: Footprint, target: Target, predictor: Predictor) -> int | None:
    """The most neurons that fit; None if not even the least do."""
    space, asked = predictor.space, target.bytes
    assert asked is not None
    whole = dense(space).budget
    if asked >= footprint.bytes(dense(space).widths):
        return whole
    if asked < footprint.bytes([space.min_width] * space.layers):
        return None
    budget = footprint.budget(target, space)
    return budget if min(predictor.allocate(budget).widths) >= least_width(footprint.bits) else None


def _options(
    footprints: dict[int, Footprint], budgets: dict[int, int | None], predictor: Predictor, qualities: Qualities
) -> Iterator[Option]:
    for bits, budget in budgets.items():
        if budget is None:
            yield Option(bits)
            continue
        ratio = predictor.space.ratio(budget)
        size = footprints[bits].bytes(predictor.allocate(budget).widths)
        yield Option(bits, ratio, size, qualities.at(bits, ratio))


def answer(run: Run | None, config: Config, target: Target, format: Format, bits: int | None = None) -> dict[str, Any]:
    """What a checkpoint of the target would be, as plain JSON values; see `Footprint.describe`.

    Raises:
        LopError: as `choose`.
    """
    return choose(run, config, target, format, bits=bits).describe()
