"""What guided moves find against the paper's, and races against none: `python benchmarks/guided.py`.

Searches of one target of the embedded model with as many evaluations each, from the uniform allocation, scored with
refit by KL to the dense model on part of the reward samples; what they find is scored on the rest, too. Prints a table,
and as the last line one JSON object: `uniform` and by way `searched` and `rest` (KL, means over seeds),
`guided_over_paper` (KL on the rest), `samples_ratio` (samples scored without races to with, both guided) and
`raced_over_guided` (KL on the rest).
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from lop.run.building import Materials, Workshop
from lop.run.config import find_config, load_config
from lop.run.run import shipped_run
from lop.search.evaluation import Evaluation
from lop.search.evaluator import Evaluator
from lop.search.ledger import Ledger
from lop.search.loop import InProcess, run_search
from lop.search.racing import Candidate, Racing
from lop.search.tree import SearchTree, TreeOptions
from lop.space.allocation import uniform

WAYS = ("paper", "guided", "raced")


@dataclass(frozen=True)
class Found:
    """What a search found."""

    searched: float
    rest: float
    samples: int
    seconds: float


class Bench:
    """The embedded model with two parts of the reward samples."""

    def __init__(self, target: float) -> None:
        config = load_config(find_config("tiny"), ["search.recovery=refit", "search.reward=divergence"])
        run = shipped_run(config)
        assert run is not None
        self.space, self.budget = run.space, run.space.budget(target)
        workshop = Workshop(Materials.of(run))
        repair = workshop.repair()
        samples = run.samples.reward
        order = np.random.default_rng(0).permutation(len(samples))
        mine, rest = ([samples[index] for index in part] for part in np.array_split(order, [len(samples) // 2]))
        self.count = len(mine)
        racing = Racing(16, 0.9, "divergence")
        rounds = racing.parts(len(mine), seed=0)
        self._raced = Evaluator(
            workshop.elastic, workshop.encode(mine, rounds=rounds), repair=repair, racing=racing, divergence=True
        )
        self._whole, self._rest = (
            Evaluator(workshop.elastic, workshop.encode(part), repair=repair, divergence=True) for part in (mine, rest)
        )

    def uniform(self) -> tuple[float, float]:
        """KL on both parts."""
        candidate = Candidate(uniform(self.space, self.budget))
        return _kl(self._whole.evaluate(candidate)), _kl(self._rest.evaluate(candidate))

    def search(self, way: str, evaluations: int, seed: int) -> Found:
        """One search."""
        options = TreeOptions(
            simulations=2 * evaluations,
            evaluations=evaluations,
            exploration=0.02,
            step=0.3,
            decay=0.8,
            children=6,
            depth=12,
            window=2,
        )
        options = replace(options, guided=way != "paper", opponent=int(way == "raced"))
        start = uniform(self.space, self.budget)
        tree = SearchTree(self.space, [start], options, seed=(seed,), reward=lambda e: e.worth("divergence"))
        started = time.perf_counter()
        with TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger", {}) as ledger:
            run_search([tree], InProcess(self._raced if way == "raced" else self._whole), ledger)
        seconds = time.perf_counter() - started
        best, evaluation = tree.best
        samples = sum(self.count if result.scored is None else result.scored for result in tree.results.values())
        return Found(_kl(evaluation), _kl(self._rest.evaluate(Candidate(best))), samples, seconds)


def _kl(evaluation: Evaluation) -> float:
    assert evaluation.divergence is not None
    return evaluation.divergence


def main() -> None:
    """Runs the searches and prints what they found."""
    parser = argparse.ArgumentParser(description="What guided moves and races are worth.")
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--evaluations", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    bench = Bench(options.target)
    start = bench.uniform()
    print(f"uniform: KL {start[0]:.4f} on {bench.count} samples, {start[1]:.4f} on the rest", flush=True)

    def searches(way: str) -> Iterator[Found]:
        for seed in range(options.seeds):
            found = bench.search(way, options.evaluations, seed)
            print(
                f"{way:<7} {seed}  KL {found.searched:.4f}, on the rest {found.rest:.4f}  "
                f"{found.samples:>7,} samples  {found.seconds:6.1f} s",
                flush=True,
            )
            yield found

    found = {way: list(searches(way)) for way in WAYS}

    def mean(way: str, name: str) -> float:
        return float(np.mean([getattr(each, name) for each in found[way]]))

    summary = {
        "benchmark": "guided",
        **vars(options),
        "uniform": start[1],
        "searched": {way: mean(way, "searched") for way in WAYS},
        "rest": {way: mean(way, "rest") for way in WAYS},
        "guided_over_paper": mean("guided", "rest") / mean("paper", "rest"),
        "samples_ratio": mean("guided", "samples") / mean("raced", "samples"),
        "raced_over_guided": mean("raced", "rest") / mean("guided", "rest"),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
