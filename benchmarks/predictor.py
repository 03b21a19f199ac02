"""How long a predictor takes from a target to an allocation, on one thread: `python benchmarks/predictor.py`.

Prints a table, and as the last line the same as JSON. `load` reads the predictor from its folder, `ratios` is the
network alone, `allocate` the network and the projection onto the budget. The networks are untrained: how long they take
does not depend on their weights.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from lop.predictor.networks import ARCHITECTURES, build, weights_of
from lop.predictor.predictor import Predictor, load_predictor
from lop.space.allocation import Space
from lop.space.size import ModelSize


def main() -> None:
    """Measures each architecture for the numbers of layers asked for."""
    parser = argparse.ArgumentParser(description="How long a predictor takes from a target to an allocation.")
    parser.add_argument("--layers", type=int, nargs="+", default=[28, 80], help="28 is the 7B, 80 the 72B")
    parser.add_argument("--rounds", type=int, default=300, help="targets, drawn at random")
    options = parser.parse_args()
    rows = []
    print(f"{'layers':>6}  {'architecture':<12} {'part':<8} {'median ms':>10} {'p99 ms':>10} {'least ms':>10}")
    for layers in options.layers:
        for architecture in ARCHITECTURES:
            for part, milliseconds in measure(architecture, layers, options.rounds).items():
                median, p99, least = (float(np.percentile(milliseconds, share)) for share in (50, 99, 0))
                row = {"layers": layers, "architecture": architecture, "part": part}
                rows.append({**row, "median_ms": median, "p99_ms": p99, "least_ms": least})
                print(f"{layers:>6}  {architecture:<12} {part:<8} {median:>10.3f} {p99:>10.3f} {least:>10.3f}")
    print(json.dumps({"benchmark": "predictor", "threads": 1, "rounds": options.rounds, "results": rows}))


def measure(architecture: str, layers: int, rounds: int) -> dict[str, list[float]]:
    """The milliseconds of each call, by part."""
    space = Space(layers, neurons=18_944, granularity=128, max_ratio=0.95)
    # Only written down and read back here: the 7B's, in bfloat16.
    size = ModelSize(layers, 18_944, 8_292_166_656, 16_584_333_312, 3 * 3584, 6 * 3584)
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "predictor"
        Predictor(architecture, weights_of(build(architecture, layers)), space, size, {}).save(folder)
        load = [_clock(partial(load_predictor, folder)) for _ in range(20)]
        predictor = load_predictor(folder)
    targets = np.random.default_rng(0).uniform(0, space.max_target, rounds).tolist()
    budgets = [space.budget(target) for target in targets]
    for budget in budgets[:10]:
        predictor.allocate(budget)
    return {
        "load": load,
        "ratios": [_clock(partial(predictor.ratios, target)) for target in targets],
        "allocate": [_clock(partial(predictor.allocate, budget)) for budget in budgets],
    }


def _clock(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000


if __name__ == "__main__":
    main()
