"""What races save and what they cost: `python benchmarks/racing.py`.

The same searches with and without races, from the same seeds, on the embedded model: samples scored, and the reward of
the allocations that were chosen, all scored in full. Prints a table, and as the last line one JSON object:
`samples_ratio` (without races to with), `reward_difference` (with races minus without, mean over targets and seeds) and
its 95% `interval` (bootstrap over seeds).
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lop.model.find import assets
from lop.run.building import Materials, build_scorer
from lop.run.config import Config, find_config, load_config
from lop.run.run import Run
from lop.search.evaluation import Evaluation, Scorer
from lop.search.ledger import Ledger
from lop.search.loop import InProcess, run_search
from lop.search.racing import Candidate
from lop.stages.search import build_trees


class Counting:
    """An evaluator that counts the samples that it scores."""

    def __init__(self, evaluator: Scorer, samples: int) -> None:
        self.scored = 0
        self._evaluator = evaluator
        self._samples = samples

    def evaluate(self, candidate: Candidate) -> Evaluation:
        """As the evaluator's own."""
        evaluation = self._evaluator.evaluate(candidate)
        self.scored += self._samples if evaluation.scored is None else evaluation.scored
        return evaluation


@dataclass(frozen=True)
class Searched:
    """One search: the samples that it scored, its seconds, and the best accuracy of each target."""

    samples: int
    seconds: float
    accuracies: tuple[float, ...]


def main() -> None:
    """Runs the searches and prints what they took and found."""
    parser = argparse.ArgumentParser(description="What races save and what they cost.")
    parser.add_argument("--config", default="tiny", metavar="YAML", help="a settings file, or the name of one")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    options = parser.parse_args()
    # A part of the whole search's targets and evaluations, unless something else is asked for.
    short = [
        "search.targets={first: 0.2, last: 0.6, step: 0.2}",
        "search.evaluations=60",
        "search.simulations=90",
        "search.reward=accuracy",
    ]
    rows = []
    print(f"{'seed':>4}  {'races':<5} {'samples':>9} {'seconds':>8}  best accuracy by target")
    for seed in range(options.seeds):
        pair = []
        for races in ("null", "{}"):
            settings = [*short, f"search.racing={races}", *options.set, f"seed={seed}"]
            found = search(load_config(find_config(options.config), settings))
            pair.append(found)
            best = " ".join(f"{accuracy:.4f}" for accuracy in found.accuracies)
            print(
                f"{seed:>4}  {'off' if races == 'null' else 'on':<5} {found.samples:>9} {found.seconds:>8.1f}  {best}"
            )
        rows.append(pair)
    print(json.dumps({"benchmark": "racing", "config": options.config, "seeds": options.seeds, **summary(rows)}))


def search(config: Config) -> Searched:
    """One search with the statistics that ship, in this process."""
    run = Run(config, assets() / "run")
    evaluator = Counting(build_scorer(Materials.of(run), run.samples.reward), len(run.samples.reward))
    trees = build_trees(run)
    started = time.perf_counter()
    with TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger", {}) as ledger:
        run_search(trees.values(), InProcess(evaluator), ledger)
    seconds = time.perf_counter() - started
    return Searched(evaluator.scored, seconds, tuple(tree.best[1].accuracy for tree in trees.values()))


def summary(rows: list[list[Searched]]) -> dict[str, Any]:
    """What the last line says."""
    without, races = ([pair[index] for pair in rows] for index in range(2))
    differences = np.array([np.subtract(b.accuracies, a.accuracies).mean() for a, b in zip(without, races)])
    random = np.random.default_rng(0)
    means = random.choice(differences, (10_000, len(differences))).mean(axis=1)
    return {
        "samples_ratio": sum(found.samples for found in without) / sum(found.samples for found in races),
        "seconds_ratio": sum(found.seconds for found in without) / sum(found.seconds for found in races),
        "reward_difference": float(differences.mean()),
        "interval": [float(bound) for bound in np.quantile(means, (0.025, 0.975))],
        "by_seed": differences.tolist(),
    }


if __name__ == "__main__":
    main()
