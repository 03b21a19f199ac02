"""What a worker needs of the cluster: whether it can ever be had, and what is waited for while it is not there."""

import logging
import time
from dataclasses import dataclass

import ray

from lop.errors import LopError
from lop.run.config import Config

log = logging.getLogger(__name__)
_SECONDS_OF_SILENCE = 30.0
# Ray's label for a machine's type, which machines have that an autoscaler started.
_TYPE = "ray.io/node-group"


@dataclass(frozen=True)
class Needs:
    """CPUs and GPUs that one worker holds while it is there."""

    cpus: float = 1
    gpus: float = 0

    @classmethod
    def of(cls, config: Config) -> "Needs":
        """Those of a worker that holds the config's model: torch's threads matter where there is no GPU."""
        return cls(1 if config.gpus_per_worker else config.threads, config.gpus_per_worker)

    def __str__(self) -> str:
        return _amounts({"CPU": self.cpus, "GPU": self.gpus})

    def check(self) -> None:
        """Looks whether a worker could be had, now or once the cluster has grown. Ray must be connected.

        Raises:
            LopError: no machine is large enough, and there is no autoscaler that might start one.
        """
        machines = [node for node in ray.nodes() if node["Alive"]]
        if any(_TYPE in node["Labels"] for node in machines) or any(self._fits(node["Resources"]) for node in machines):
            return
        there = "; ".join(sorted({_amounts(node["Resources"]) for node in machines})) or "none"
        remedies = ["`--set gpus_per_worker=0` does without GPUs"] if self.gpus else []
        remedies += ["`--set threads=1` asks for one CPU"] if self.cpus > 1 else []
        raise LopError(
            f"a worker needs {self}, which no machine here has ({there}), and no autoscaler would start another: "
            f"{', '.join([*remedies, '`--workers 0` does without workers'])}"
        )

    def _fits(self, resources: dict[str, float]) -> bool:
        return resources.get("CPU", 0) >= self.cpus and resources.get("GPU", 0) >= self.gpus


ONE_CPU = Needs()


class Wait:
    """Says from time to time what is waited for, while no worker is ready."""

    def __init__(self, needs: Needs) -> None:
        self._needs = needs
        self.heard()

    def heard(self) -> None:
        """A worker is ready, or has shown that it will be."""
        self._since = self._told = time.monotonic()

    def remind(self) -> None:
        """Still none: logs a line where the last one was long enough ago."""
        now = time.monotonic()
        if now - self._told >= _SECONDS_OF_SILENCE:
            self._told = now
            log.warning(
                "waiting for a worker for %.0f s: each needs %s; the cluster has %s, of which free %s",
                now - self._since,
                self._needs,
                _amounts(ray.cluster_resources()),
                _amounts(ray.available_resources()),
            )


def _amounts(resources: dict[str, float]) -> str:
    return " and ".join(f"{resources.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
