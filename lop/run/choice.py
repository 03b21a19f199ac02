"""From a target to an allocation and to the bits of its weights: the best pair that fits, as far as it was measured."""

import logging
from dataclasses import dataclass
from typing import Any

from lop.checkpoint.bits import BITS, Packing, check_bits, is_too_narrow, packing
from lop.checkpoint.footprint import Footprint
from lop.checkpoint.formats import FORMATS, Format, check_format
from lop.checkpoint.recoveries import Recovery, untrained
from lop.model.sources import family_of
from lop.model.tensors import out_projections
from lop.predictor.unsearched import Answering
from lop.run.config import Config
from lop.run.prediction import check_profile, predictor_for, shape_of, what_ships
from lop.run.qualities import Qualities, read_qualities
from lop.run.run import Run
from lop.space.allocation import Allocation, Space, dense, leanest
from lop.space.size import Target

log = logging.getLogger(__name__)


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
        footprint: what its checkpoint takes.
        options: all that were weighed against each other; empty where the bits were given, or nothing was measured.
    """

    target: Target
    predictor: Answering
    footprint: Footprint
    allocation: Allocation
    options: tuple[Option, ...] = ()

    @property
    def bits(self) -> int:
        """Of the weights."""
        return self.footprint.bits

    @property
    def ratio(self) -> float:
        """The allocation's pruning ratio."""
        space = self.predictor.space
        return space.ratio_of(self.allocation.widths)

    def describe(self) -> dict[str, Any]:
        """Plain JSON values; see `Footprint.describe`."""
        found = self.footprint.describe(self.allocation, self.predictor.space, self.target)
        return found | ({} if self.source is None else {"source": self.source})

    @property
    def source(self) -> str | None:
        """Where the allocation comes from, if not from the model's own search."""
        return self.predictor.source


def packing_of(run: Run, bits: int, *, vision: bool = False) -> Packing | None:
    """How a run's checkpoints of so many bits are quantised; None if they are not.

    Raises:
        LopError: weights cannot have so many bits, or the granularity leaves no group that divides all rows.
    """
    check_bits(bits)
    if bits == BITS[0]:
        return None
    tensors, attention = run.tensors, run.space.attention
    heads = tensors[out_projections(tensors)[0][0]].shape[1] // attention.groups if attention else 0
    family, granularity = family_of(run.model_folder), run.config.granularity
    return packing(tensors, family, bits, granularity=granularity, heads=heads, vision=vision)


def footprint_of(run: Run, format: Format, recovery: Recovery, bits: int, *, vision: bool = False) -> Footprint:
    """What a run's checkpoints take.

    Raises:
        LopError: as `packing_of`; or the format has no place for what the recovery adds, or for so many bits.
    """
    check_format(format, recovery, bits)
    found = packing_of(run, bits, vision=vision)
    attention = run.space.attention
    groups = attention.groups if attention else None
    weight = None if found is None else found.weight(run.size, run.tensors, groups)
    return Footprint(run.size, format, recovery, shape_of(run), run.model_folder, weight, attention)


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
        LopError: the target cannot be met, or the predictor or the device's profile is missing or of another model.
    """
    owner, predictor = run or what_ships(config), predictor_for(run, config)
    if target.profile is not None:
        check_profile(target.profile, predictor)
    _warn_of_recovery(predictor, config.recovery)
    plain = footprint_of(owner, format, config.recovery, bits or BITS[0], vision=vision)
    # Where all layers keep alike, they are not what was measured; and some formats have weights of types of their own.
    is_open = bits is None and target.bytes is not None and not (plain.is_uniform(target) or FORMATS[format].gguf)
    qualities = read_qualities(owner) if is_open else None
    if qualities is None or qualities.recovery != config.recovery:
        return Choice(target, predictor, plain, plain.allocate(target, predictor.space, predictor.allocate))
    return _best(owner, predictor, plain, target, qualities, vision=vision)


def _warn_of_recovery(predictor: Answering, recovery: Recovery) -> None:
    """Says so where widths would do without what they were searched with: it finds what that can make up for."""
    searched = predictor.fingerprints.get("recovery")
    if searched is not None and searched != untrained(recovery):
        log.warning(
            "the search scored widths with recovery %s: with %s they may be worse than uniform ones "
            "(--recovery %s keeps to it; `lop search --set search.recovery=%s` searches for the other)",
            searched,
            recovery,
            searched,
            untrained(recovery),
        )


def _best(
    run: Run, predictor: Answering, plain: Footprint, target: Target, qualities: Qualities, *, vision: bool
) -> Choice:
    assert target.bytes is not None
    space = predictor.space
    if target.bytes > plain.bytes(dense(space).widths):
        plain.budgets(target, space)  # Which refuses it, as ever.
    footprints = {bits: footprint_of(run, plain.format, plain.recovery, bits, vision=vision) for bits in qualities.bits}
    found = {bits: _fitting(footprint, target, predictor) for bits, footprint in footprints.items()}
    options = tuple(_option(footprint, found[bits], space, qualities) for bits, footprint in footprints.items())
    known = [option for option in options if option.divergence is not None]
    fits = known or [option for option in options if option.ratio is not None]
    # Of those that nothing is known of the one with most bits; and if none fits, the smallest says what would.
    bits = min(fits, key=lambda option: option.divergence or 0.0).bits if fits else min(qualities.bits)
    allocation = found[bits] or footprints[bits].allocate(target, space, predictor.allocate)
    return Choice(target, predictor, footprints[bits], allocation, options)


def _fitting(footprint: Footprint, target: Target, predictor: Answering) -> Allocation | None:
    """The largest allocation that fits, at most the dense one; None if not even the least does."""
    space, asked = predictor.space, target.bytes
    assert asked is not None
    if asked >= footprint.bytes(dense(space).widths):
        return dense(space)
    if asked < footprint.bytes(leanest(space).widths):
        return None
    found = footprint.allocate(target, space, predictor.allocate)
    is_narrow = footprint.bits != BITS[0] and is_too_narrow(footprint.bits, found.widths[: space.layers])
    return None if is_narrow else found


def _option(footprint: Footprint, found: Allocation | None, space: Space, qualities: Qualities) -> Option:
    if found is None:
        return Option(footprint.bits)
    ratio = space.ratio_of(found.widths)
    return Option(footprint.bits, ratio, footprint.bytes(found.widths), qualities.at(footprint.bits, ratio))


def answer(run: Run | None, config: Config, target: Target, format: Format, bits: int | None = None) -> dict[str, Any]:
    """What a checkpoint of the target would be, as plain JSON values; see `Footprint.describe`.

    Raises:
        LopError: as `choose`.
    """
    return choose(run, config, target, format, bits=bits).describe()
