"""The probes of a run: a few evaluations that correct what the general predictor expects. Without torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lop.errors import LopError
from lop.predictor.probing import Probe
from lop.run.run import Run
from lop.space.allocation import Allocation
from lop.storage.files import read_json, write_json
from lop.storage.fingerprint import check_fingerprints


@dataclass(frozen=True)
class Probed:
    """What `lop probe` found.

    Attributes:
        probes: layers that were pruned alone.
        best: by budget, the best of the allocations that were compared.
        evaluations: that were made for all of this.
    """

    probes: tuple[Probe, ...] = ()
    best: Mapping[int, Allocation] = field(default_factory=dict)
    evaluations: int = 0


def probes_file(run: Run) -> Path:
    """Where a run's probes are."""
    return run.folder / "probes.json"


def save_probes(run: Run, found: Probed) -> None:
    """Writes what was found."""
    record = {
        "fingerprints": _made_from(run),
        "evaluations": found.evaluations,
        "probes": [asdict(probe) for probe in found.probes],
        "best": {str(budget): allocation.widths for budget, allocation in found.best.items()},
    }
    write_json(probes_file(run), record)
    run.keep(probes_file(run))


def load_probes(run: Run) -> Probed:
    """What `lop probe` wrote; nothing if it was not run.

    Raises:
        LopError: it is damaged, or of another model, other samples or another importance.
    """
    path = probes_file(run)
    if not path.exists():
        return Probed()
    record: dict[str, Any] = read_json(path)
    try:
        probes = tuple(Probe(int(x["layer"]), float(x["share"]), float(x["damage"])) for x in record["probes"])
        best = {int(budget): Allocation(tuple(map(int, widths))) for budget, widths in record["best"].items()}
        found, made_from = Probed(probes, best, int(record["evaluations"])), dict(record["fingerprints"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LopError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    check_fingerprints(str(path), made_from, _made_from(run))
    return found


def _made_from(run: Run) -> dict[str, str]:
    return {**run.calibration_fingerprints, "importance": run.config.importance}
