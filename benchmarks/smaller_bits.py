"""What 8, 4 and 3 bits cost `smol`, pruned and not: `python benchmarks/smaller_bits.py`.

Each pair of a pruning ratio and a number of bits is a small file under `results/smaller`, scored on the first 300 of
the test items of `benchmarks/smol.py`. All pairs are made alike, as `lop prune --bits` does (`quantised_elastic`):
refit layer by layer, below 8 bits with GPTQ, on the calibration samples. Widths are those that LOP's search
found where `results/smol` has them, else uniform. Weights are unpacked for scoring: what the checkpoint holds, without
its kernels. `--check N` makes N of the cells again.

The last line is JSON: `four_bit_kl_ratio` by ratio (KL to dense of pruned and 4 bits over pruned alone); `joint_lead`
by size in bytes: by how much a rival's KL is above the pair's, in nats, with the 95% interval (paired bootstrap over
images and texts), for `pruning` alone and for `bits` alone at the same size. The pair of each size was fixed before
scoring. A rival that has nothing as small gets its smallest, which is then larger than the pair. Bits alone may have 3,
which `lop prune` does not offer.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from bench import Bench
from cells import cell, run

from lop.checkpoint.bits import BITS
from lop.checkpoint.compensation import quantised_elastic
from lop.checkpoint.footprint import Footprint
from lop.checkpoint.packing import stored_dtype
from lop.checkpoint.recovery import CATCH_UP
from lop.model.rounding import Rounding
from lop.model.samples import fingerprint_samples
from lop.report.intervals import keyed_bootstrap
from lop.run.choice import packing_of
from lop.search.evaluator import Evaluator
from lop.search.racing import pack_values, unpack_values
from lop.space.allocation import Allocation, uniform
from lop.storage.files import read_json
from lop.storage.fingerprint import fingerprint
from lop.storage.headers import read_tensors

RESULTS = Path(__file__).parent.parent / "results" / "smaller"
CHOSEN = RESULTS.parent / "smol"
ITEMS = 300
RATIOS = (0.3, 0.5)
# By size, which the pair's checkpoint has: what it is compared with.
JOINT = ((0.1, 8), (0.1, 4), (0.2, 4), (0.3, 4))
BITS_ALONE = (16, 8, 4, 3)
Pair = tuple[float, int]


class Smaller:
    """The model, and what is measured with it, each made when it is first needed."""

    def __init__(self, runs: Path) -> None:
        self._bench = Bench("smol", runs, 0, [CHOSEN])
        self.run = self._bench.run
        self.items = self._bench.items[:ITEMS]

    def widths(self, ratio: float) -> tuple[int, ...]:
        """LOP's search's where there are some, else uniform ones."""
        path = CHOSEN / f"choice-lop-search-{ratio}-0.json"
        if path.exists():
            return tuple(read_json(path)["widths"])
        space = self.run.space
        return uniform(space, space.budget(ratio)).widths

    def bytes(self, pair: Pair) -> int:
        """Of the pair's checkpoint."""
        ratio, bits = pair
        return self._footprint(bits).bytes(self.widths(ratio))

    def pruning_alone(self, size: int) -> Pair:
        """The least pruned 16 bits that fit a size, else the most pruned."""
        space, footprint = self.run.space, self._footprint(BITS[0])
        ratios = [step / 100 for step in range(100) if step / 100 <= space.max_target]
        fits = [r for r in ratios if footprint.bytes(uniform(space, space.budget(r)).widths) <= size]
        return min(fits, default=ratios[-1]), BITS[0]

    def bits_alone(self, size: int) -> Pair:
        """The most bits that fit a size unpruned, else the fewest."""
        return 0.0, next((bits for bits in BITS_ALONE if self.bytes((0.0, bits)) <= size), BITS_ALONE[-1])

    def scored(self, pair: Pair) -> dict[str, Any]:
        """The pair's cell."""
        ratio, bits = pair
        widths = self.widths(ratio)
        made_from = fingerprint([self._made_from, widths, bits])
        return cell(RESULTS / f"{ratio:g}-{bits}.json", made_from, lambda: self.score(pair))

    def score(self, pair: Pair) -> dict[str, Any]:
        """What a pair says to the test items."""
        ratio, bits = pair
        rounding = None if bits == BITS[0] else Rounding(bits, self._group)
        with quantised_elastic(
            self._bench.workshop.elastic,
            Allocation(self.widths(ratio)),
            "refit",
            rounding,
            means=self.run.statistics.mean,
            calibration=self._calibration,
            dtype=stored_dtype(self.run.model_folder),
        ):
            found = self._evaluator.now()
        return {"ratio": ratio, "bits": bits, "bytes": self.bytes(pair), "divergence": pack_values(found.divergence)}

    def kl(self, pair: Pair) -> np.ndarray:
        """[items] KL to dense, in nats."""
        return np.zeros(ITEMS) if pair == (0.0, BITS[0]) else unpack_values(self.scored(pair)["divergence"])

    def lead(self, pair: Pair, rival: Pair) -> dict[str, Any]:
        """By how much a rival's KL is above the pair's."""
        found = keyed_bootstrap(self.kl(rival) - self.kl(pair), [sample.keys[0] for sample in self.items])
        about = {"ratio": rival[0], "bits": rival[1], "bytes": self.bytes(rival)}
        return {**about, "lead": found.value, "interval": [found.low, found.high]}

    @property
    def _group(self) -> int:
        packing = packing_of(self.run, BITS[-1])
        assert packing is not None
        return packing.group

    def _footprint(self, bits: int) -> Footprint:
        if bits == BITS[0]:
            return Footprint(self.run.size)
        # 3 bits are not offered, but weigh by the same rule.
        packing = packing_of(self.run, BITS[-1])
        assert packing is not None
        tensors = read_tensors(self.run.model_folder)
        packing = type(packing)(bits, packing.group, packing.tensors)
        return Footprint(self.run.size, quantised=packing.weight(self.run.size, tensors))

    @cached_property
    def _evaluator(self) -> Evaluator:
        workshop = self._bench.workshop
        workshop.elastic.sort(self.run.order)
        evaluator = Evaluator(workshop.elastic, workshop.encode(self.items), divergence=True)
        evaluator.remember()
        return evaluator

    @cached_property
    def _calibration(self) -> Any:
        _ = self._evaluator  # What the dense model says comes first.
        return self._bench.workshop.encode(self.run.samples.calibration)

    @cached_property
    def _made_from(self) -> str:
        run = self.run
        return fingerprint(
            [run.calibration_fingerprints, run.config.importance, fingerprint_samples(self.items), CATCH_UP]
        )


def pairs(smaller: Smaller) -> list[Pair]:
    """All that the summary needs, those of most use first."""
    sizes = [smaller.bytes(pair) for pair in JOINT]
    rivals = [rival(size) for size in reversed(sizes) for rival in (smaller.bits_alone, smaller.pruning_alone)]
    wanted = [*((ratio, bits) for ratio in RATIOS for bits in (4, 16)), *JOINT, *rivals, (0.0, 4), (0.0, 8)]
    return list(dict.fromkeys(pair for pair in wanted if pair != (0.0, BITS[0])))


def summary(runs: Path = Path("runs/benchmark-smol")) -> dict[str, Any]:
    """Makes the cells that are missing, prints a table, and returns the JSON fields."""
    smaller = Smaller(runs)
    for pair in pairs(smaller):
        ratio, bits = pair
        print(
            f"{ratio:>5.0%} pruned  {bits:>2} bits  {smaller.bytes(pair):>12,} bytes  KL {smaller.kl(pair).mean():.4f}"
        )
    ratios = {
        str(ratio): float(smaller.kl((ratio, 4)).mean() / smaller.kl((ratio, BITS[0])).mean()) for ratio in RATIOS
    }
    leads = {}
    for pair in JOINT:
        size = smaller.bytes(pair)
        about = {"ratio": pair[0], "bits": pair[1], "kl": float(smaller.kl(pair).mean())}
        rivals = {"pruning": smaller.pruning_alone(size), "bits": smaller.bits_alone(size)}
        leads[str(size)] = {**about, **{name: smaller.lead(pair, rival) for name, rival in rivals.items()}}
    return {"four_bit_kl_ratio": ratios, "joint_lead": leads}


def check(count: int, runs: Path = Path("runs/benchmark-smol")) -> tuple[int, int]:
    """Makes cells again, chosen at random; returns how many, and how many agree."""
    return count, sum(_agree(Smaller(runs), count))


def _agree(smaller: Smaller, count: int) -> Iterator[bool]:
    records = [read_json(path) for path in sorted(RESULTS.glob("[0-9]*.json"))]
    for index in np.random.default_rng().permutation(len(records))[:count]:
        pair = records[index]["ratio"], records[index]["bits"]
        known, again = (unpack_values(found["divergence"]) for found in (smaller.scored(pair), smaller.score(pair)))
        print(f"{pair[0]:.0%} pruned, {pair[1]} bits: KL {known.mean():.4f}, again {again.mean():.4f}")
        yield bool(abs(known.mean() - again.mean()) <= 0.03 * abs(known.mean()) + 0.005)


if __name__ == "__main__":
    run("smaller-bits", "What fewer bits cost smol, pruned and not.", summary, check)
