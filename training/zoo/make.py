"""Makes the zoo: trains its members, measures them, and keeps what a predictor learns from.

    python -m training.zoo.make --work WORK [--workers N] [MEMBER …]

Each member is one piece of work, on Ray or, with `--workers 0`, in this process; interrupted, the same command goes on.
Weights stay in WORK; features and damages go to `training/zoo/data`.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from lop.model.find import EMBEDDED
from lop.run.compute import Compute
from lop.run.config import find_config, load_config
from lop.stages.local import Local
from lop.storage.files import write_json
from training.zoo.data import FOLDER
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


class Maker:
    """Trains and measures members."""

    def __init__(self, work: Path) -> None:
        self._work = work

    def __call__(self, name: str) -> dict[str, Any]:
        """The member's record."""
        if name in MEMBERS:
            train_member(MEMBERS[name], self._work)
        return lab(name, self._work).record(self._work / f"{name}.json")


def main() -> None:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("members", nargs="*", metavar="MEMBER", help=f"{EMBEDDED}, {', '.join(MEMBERS)} (all)")
    parser.add_argument("--work", type=Path, required=True, help="where weights and samples are kept")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="Ray actors; 0 works in this process")
    options = parser.parse_args()
    if unknown := set(options.members) - {EMBEDDED, *MEMBERS}:
        parser.error(f"{', '.join(sorted(unknown))}: not of {EMBEDDED}, {', '.join(MEMBERS)}")
    compute: Compute = Local()
    if options.workers:
        from ray_jobs.compute import OnRay

        compute = OnRay()
    names = [name for name in options.members or [EMBEDDED, *MEMBERS] if not (FOLDER / f"{name}.json").exists()]
    zoo_samples(options.work / "samples")
    config = load_config(find_config(EMBEDDED), workers=options.workers)
    for name, record in compute.map(partial(Maker, options.work.resolve()), names, config):
        write_json(FOLDER / f"{name}.json", record)
        print(f"{name}: {record['layers']} layers, {record['accuracy']:.1%} right", flush=True)


if __name__ == "__main__":
    main()
