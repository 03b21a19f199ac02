"""Which reward chooses best: `python benchmarks/reward.py --run RUN [--config YAML]`.

Takes the evaluations of a search, chooses each target's best allocation by each reward that they hold, and scores the
chosen ones on the calibration and on the test questions, which no reward has seen. Prints a row for each target, and as
the last line one JSON object: for each set of questions and reward the mean accuracy over targets in percent, and the
difference to choosing by accuracy with its 95% interval (bootstrap over targets).
"""

import argparse
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from lop.model.samples import Sample
from lop.run.building import Materials, build_scorer
from lop.run.config import find_config, load_config
from lop.run.results import Found, read_search
from lop.run.run import Run
from lop.search.racing import Candidate
from lop.space.allocation import Allocation

REWARDS = ("accuracy", "log_probability", "divergence", "margin")


def main() -> None:
    """Scores what each reward chooses, and prints it."""
    parser = argparse.ArgumentParser(description="Which reward chooses best.")
    parser.add_argument("--run", required=True, type=Path, help="the folder of a search that has ended")
    parser.add_argument("--config", default="tiny", metavar="YAML", help="a settings file, or the name of one")
    options = parser.parse_args()
    run = Run(load_config(find_config(options.config)), options.run)
    found = read_search(run)
    held = [reward for reward in REWARDS if getattr(found[0].evaluations[0][1], reward) is not None]
    summary = {}
    for name, samples in (("calibration", run.samples.calibration), ("test", run.samples.test)):
        print(f"{name}: {len(samples)} questions\n{'target':>7}  {'  '.join(f'{reward:>15}' for reward in held)}")
        summary[name] = differences(run, found, samples, held)
    print(json.dumps({"benchmark": "reward", "targets": len(found), **summary}))


def differences(
    run: Run, found: Sequence[Found], samples: Sequence[Sample], rewards: Sequence[str]
) -> dict[str, dict[str, object]]:
    """What the last line says of one set of questions."""
    evaluator = build_scorer(Materials.of(run), samples)

    @cache
    def accuracy(allocation: Allocation) -> float:
        return 100 * evaluator.evaluate(Candidate(allocation)).accuracy

    rows = []
    for result in found:
        rows.append([accuracy(chosen(result, reward)) for reward in rewards])
        print(f"{result.target:>7.1%}  {'  '.join(f'{value:>15.2f}' for value in rows[-1])}", flush=True)
    table = np.array(rows)
    gains = table - table[:, [rewards.index("accuracy")]]
    drawn = np.random.default_rng(0).integers(len(table), size=(10_000, len(table)))
    low, high = np.quantile(gains[drawn].mean(axis=1), (0.025, 0.975), axis=0)
    return {
        reward: {"accuracy": table[:, i].mean(), "gain": gains[:, i].mean(), "interval": [low[i], high[i]]}
        for i, reward in enumerate(rewards)
    }


def chosen(result: Found, reward: str) -> Allocation:
    """The best allocation by a reward, of those scored in full; of equals, the likelier answers."""
    complete = [item for item in result.evaluations if item[1].is_complete and not item[1].error]
    return max(complete, key=lambda item: (item[1].worth(reward), item[1].log_probability))[0]


if __name__ == "__main__":
    main()
