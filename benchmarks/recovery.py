"""What a refit is worth, and how much of earlier layers' error it should make up for: `python benchmarks/recovery.py`.

On `smol`, for widths chosen already (`results/smol`), KL to the dense model on `--items` reward samples with each share
of `lop.checkpoint.recovery.CATCH_UP`, from which the default is chosen, and on as many test samples with the default;
beside them no recovery and the refit from one factor a layer, which the search scores with. Each is a small file under
`results/recovery`; what is missing is made, about three minutes each on one core. `--check N` makes N of them again.

The last line is JSON: `kl` by widths, samples and recovery, and `best` share by widths.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench import Bench
from cells import cell

from lop.checkpoint.recovery import CATCH_UP
from lop.model.elastic import Repair
from lop.model.repair import RIDGE
from lop.model.samples import Sample, fingerprint_samples
from lop.search.evaluator import Evaluator
from lop.search.racing import pack_values, unpack_values
from lop.space.allocation import Allocation
from lop.storage.files import read_json
from lop.storage.fingerprint import fingerprint

RESULTS = Path(__file__).parent.parent / "results" / "recovery"
CHOSEN = RESULTS.parent / "smol"
WIDTHS = ("uniform-0.3-0", "lop-search-0.3-0", "uniform-0.5-0", "lop-search-0.5-0")
SHARES = (0.0, 0.5, 1.0)
SHIPPED = f"refit {CATCH_UP}"


class Recoveries:
    """Scores of a recovery for widths that were chosen.

    Args:
        items: how many samples of each set.
    """

    def __init__(self, bench: Bench, items: int) -> None:
        self._bench = bench
        sets = {"reward": bench.run.samples.reward, "test": bench.items}
        self._samples = {name: _spread(samples, items) for name, samples in sets.items()}

    def cell(self, widths: str, recovery: str, samples: str) -> dict[str, Any]:
        """KL of each item."""
        chosen = read_json(CHOSEN / f"choice-{widths}.json")["widths"]
        made_from = fingerprint(
            [self._bench.run.calibration_fingerprints, fingerprint_samples(self._samples[samples]), chosen, RIDGE]
        )
        name = f"{widths} {recovery} {samples}".replace(" ", "-")
        return cell(RESULTS / f"{name}.json", made_from, lambda: self.score(tuple(chosen), recovery, samples))

    def score(self, widths: tuple[int, ...], recovery: str, samples: str) -> dict[str, Any]:
        """The same, made now."""
        workshop = self._bench.workshop
        evaluator = Evaluator(
            workshop.elastic,
            workshop.encode(self._samples[samples]),
            repair=self._repair(widths, recovery),
            divergence=True,
        )
        return {"divergence": pack_values(evaluator.compared(Allocation(widths)).divergence)}

    def _repair(self, widths: tuple[int, ...], recovery: str) -> Repair | None:
        if recovery == "factor":
            return self._bench.repair(self._bench.run.config.importance)
        if recovery == "none":
            return self._bench.repair(self._bench.run.config.importance, "none")
        catch_up = float(recovery.split()[1])
        return self._bench.exported(self._bench.run.config.importance, widths, catch_up)


def _spread(samples: list[Sample], count: int) -> list[Sample]:
    """As many as asked for, evenly over all."""
    return [samples[index] for index in np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)]


def asked(widths: list[str]) -> Iterator[tuple[str, str, str]]:
    """Widths, recovery and samples of every cell."""
    for name in widths:
        for share in SHARES:
            yield name, f"refit {share}", "reward"
        for recovery in ("none", "factor", SHIPPED):
            yield name, recovery, "test"


def main() -> None:
    """Makes what is missing, and prints."""
    parser = argparse.ArgumentParser(description="What a refit is worth, on smol.")
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS), help="of results/smol/choice-*.json")
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--check", type=int, default=0, metavar="N", help="make N scores again")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-smol"), help="where calibration is kept")
    options = parser.parse_args()
    recoveries = Recoveries(Bench("smol", options.runs, 0, [CHOSEN]), options.items)
    cells = list(asked(options.widths))
    if options.check:
        agree = 0
        for index in np.random.default_rng().permutation(len(cells))[: options.check]:
            widths, recovery, samples = cells[index]
            known = unpack_values(recoveries.cell(*cells[index])["divergence"])
            chosen = tuple(read_json(CHOSEN / f"choice-{widths}.json")["widths"])
            again = unpack_values(recoveries.score(chosen, recovery, samples)["divergence"])
            print(f"{widths}, {recovery}, {samples}: KL {known.mean():.4f}, again {again.mean():.4f}")
            agree += bool(np.allclose(known, again, rtol=0.05, atol=0.05))
        print(json.dumps({"benchmark": "recovery", "checked": min(options.check, len(cells)), "agree": agree}))
        return
    kl: dict[str, dict[str, dict[str, float]]] = {}
    for widths, recovery, samples in cells:
        value = float(unpack_values(recoveries.cell(widths, recovery, samples)["divergence"]).mean())
        kl.setdefault(widths, {}).setdefault(samples, {})[recovery] = value
        print(f"{widths:<18} {samples:<7} {recovery:<10} KL {value:.4f}", flush=True)
    best = {widths: min(found["reward"], key=found["reward"].__getitem__) for widths, found in kl.items()}
    print(json.dumps({"benchmark": "recovery", "items": options.items, "kl": kl, "best": best}))


if __name__ == "__main__":
    main()
