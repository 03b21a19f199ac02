"""Makes the zoo: trains its members, measures and searches them, and keeps what a predictor learns from.

    python -m training.zoo.make --work WORK [--workers N] [--device cuda] [--search FIRST LAST] [MEMBER …]

Each member is one piece of work, on Ray or, with `--workers 0`, in this process; interrupted, the same command goes on.
A member trains for minutes on a core; with `--device cuda` all workers share one GPU.
Weights stay in WORK; features and damages go to `training/zoo/data`, and the best of the searches to `searches` there.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lop.model.find import EMBEDDED
from lop.run.compute import Compute
from lop.run.config import find_config, load_config
from lop.space.allocation import Allocation
from lop.stages.local import Local
from lop.storage.files import write_json
from training.zoo.data import FOLDER, load_searches, save_searches
from training.zoo.measure import Lab, zoo_samples
from training.zoo.members import MEMBERS
from training.zoo.train import train_member

# Units of the models that are no zoo's own.
_GRANULARITIES = {EMBEDDED: 8}


def lab(name: str, work: Path) -> Lab:
    """Where a member, trained before, or `tiny` is measured."""
    samples = str(zoo_samples(work / "samples"))
    if name in _GRANULARITIES:
        return Lab(name, name, samples, _GRANULARITIES[name], work / "runs")
    return Lab(name, str(work / name), samples, MEMBERS[name].granularity, work / "runs")


@dataclass(frozen=True)
class Maker:
    """Trains and measures members."""

    work: Path
    device: str

    def __call__(self, name: str) -> dict[str, Any]:
        """The member's record."""
        if name in MEMBERS:
            train_member(MEMBERS[name], self.work, device=self.device)
        return lab(name, self.work).record(self.work / f"{name}.json")


@dataclass(frozen=True)
class Searcher:
    """Runs the own searches of members that were made, for two targets."""

    work: Path
    first: float
    last: float

    def __call__(self, name: str) -> dict[float, list[Allocation]]:
        """The best of them."""
        return lab(name, self.work).searched(self.first, self.last)


def main() -> None:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("members", nargs="*", metavar="MEMBER", help=f"{EMBEDDED}, {', '.join(MEMBERS)} (all)")
    parser.add_argument("--work", type=Path, required=True, help="where weights and samples are kept")
    parser.add_argument("--search", nargs=2, type=float, metavar="TARGET", help="then run their own searches for two")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="Ray actors; 0 works in this process")
    parser.add_argument("--device", default="cpu", help="to train on (cpu), which workers share")
    options = parser.parse_args()
    if unknown := set(options.members) - {EMBEDDED, *MEMBERS}:
        parser.error(f"{', '.join(sorted(unknown))}: not of {EMBEDDED}, {', '.join(MEMBERS)}")
    compute, work = compute_with(options.workers), options.work.resolve()
    names = options.members or [EMBEDDED, *MEMBERS]
    zoo_samples(work / "samples")
    config = load_config(find_config(EMBEDDED), workers=options.workers)
    training = config.model_copy(update={"gpus_per_worker": _share(options.device, options.workers)})
    missing = [name for name in names if not (FOLDER / f"{name}.json").exists()]
    for name, record in compute.map(partial(Maker, work, options.device), missing, training):
        write_json(FOLDER / f"{name}.json", record)
        print(f"{name}: {record['layers']} layers, {record['accuracy']:.1%} right", flush=True)
    if options.search:
        first, last = options.search
        missing = [name for name in names if not {first, last} <= load_searches(name).keys()]
        for name, found in compute.map(partial(Searcher, work, first, last), missing, config):
            save_searches(name, found)
            print(f"{name}: searched for {first:.0%} and {last:.0%}", flush=True)


def _share(device: str, workers: int) -> float:
    """The GPUs that each worker asks for: members are too small to fill one."""
    return 1 / workers if workers and device != "cpu" else 0.0


def compute_with(workers: int) -> Compute:
    """On Ray, or without workers in this process."""
    if not workers:
        return Local()
    from ray_jobs.compute import OnRay

    return OnRay()


if __name__ == "__main__":
    main()
