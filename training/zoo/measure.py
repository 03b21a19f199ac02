"""What is kept of a member of the zoo: its features, the damage of each layer alone, allocations and what they cost.

Everything is scored by KL divergence from the dense model with the refit that one factor a layer gives every width
(`lop.model.repair`), in one order of neurons.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lop.methods.method import Given
from lop.methods.registry import METHODS
from lop.model.find import find_samples
from lop.model.repair import Refits, factors
from lop.model.samples import Sample, load_sample_sets
from lop.run.building import Materials, Workshop
from lop.run.config import Config, find_config, load_config
from lop.run.results import read_search
from lop.run.run import Run
from lop.run.surveys import statistics_for
from lop.search.evaluator import Evaluator
from lop.space.allocation import Allocation, Space
from lop.space.features import PRUNED, Features
from lop.stages.calibrate import calibrate_stage, features_stage
from lop.stages.local import Local
from lop.stages.search import search_stage
from lop.storage.files import read_json, write_json
from training.tiny.make_samples import write

TARGETS = (0.2, 0.3, 0.5, 0.6)
# Of `tiny`'s reward and test samples, drawn once: a zoo is measured ten thousand times.
REWARD, TEST = 240, 600
# So many of a search's allocations are kept.
_BEST = 5
PUBLISHED = ("flap", "owl", "alphapruning")


def zoo_samples(folder: Path) -> Path:
    """`tiny`'s samples, fewer of them."""
    if not (folder / "test.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        sets = load_sample_sets(find_samples("tiny"))
        for split, count in (("calibration", None), ("reward", REWARD), ("test", TEST)):
            write(_drawn(getattr(sets, split), count), folder / f"{split}.parquet")
    return folder


def _drawn(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    chosen = sorted(np.random.default_rng(0).permutation(len(samples))[:count])
    return [samples[index] for index in chosen]


@dataclass(frozen=True)
class Lab:
    """A model and what is measured with it, each made when it is first needed.

    Attributes:
        model: a shipped model's name, or a checkpoint's folder.
        work: where its runs are.
    """

    name: str
    model: str
    samples: str
    granularity: int
    work: Path

    def _config(self, *settings: str) -> Config:
        base = find_config("smol" if self.model == "smol" else "tiny")
        named = (f"granularity={self.granularity}", "workers=0", "search.method=guided", "search.recovery=refit")
        # In a CPU's float32 scores do not depend on which machine measured them; so small a model is no slower there.
        settings = (*named, "device=cpu", "search.reward=divergence", "search.confirm={}", *settings)
        return load_config(base, settings, model=self.model, samples=self.samples)

    @cached_property
    def run(self) -> Run:
        """With the statistics."""
        run = Run(self._config(), self.work / self.name)
        run.folder.mkdir(parents=True, exist_ok=True)
        calibrate_stage(run, progress=False)
        return run

    @property
    def space(self) -> Space:
        return self.run.space

    @cached_property
    def features(self) -> Features:
        return features_stage(self.run)

    @cached_property
    def workshop(self) -> Workshop:
        return Workshop(Materials.of(self.run))

    @cached_property
    def refits(self) -> Refits:
        backbone = self.workshop.elastic.backbone
        return Refits(list(factors(backbone, self.workshop.encode(self.run.samples.calibration))), cache_bytes=1 << 29)

    def reward(self, allocation: Allocation) -> float:
        """The mean KL on the reward samples."""
        return float(self.itemised(allocation).mean())

    def test(self, allocation: Allocation) -> float:
        """The mean KL on the test samples."""
        return float(self._on_test(allocation).mean())

    @cached_property
    def itemised(self) -> Callable[[Allocation], np.ndarray]:
        """The KL [n] on each of the reward samples."""
        return self._scorer(self.run.samples.reward)

    @cached_property
    def _on_test(self) -> Callable[[Allocation], np.ndarray]:
        return self._scorer(self.run.samples.test)

    def _scorer(self, samples: Sequence[Sample]) -> Callable[[Allocation], np.ndarray]:
        workshop = self.workshop
        evaluator = Evaluator(
            workshop.elastic,
            workshop.encode(samples),
            repair=self.refits,
            divergence=True,
            cache_bytes=self.run.config.cache_bytes,
        )
        return lambda allocation: evaluator.compared(allocation).divergence

    def damages(self) -> np.ndarray:
        """[L, 9] the KL of each layer alone at `PRUNED`, on the reward samples."""
        full = [self.space.neurons] * self.space.layers
        widths = [round(self.space.neurons * (1 - share)) for share in PRUNED]
        alone = [[*full[:layer], width, *full[layer + 1 :]] for layer in range(len(full)) for width in widths]
        return np.reshape([self.reward(Allocation(tuple(found))) for found in alone], (len(full), len(widths)))

    def published(self, method: str, target: float) -> Allocation:
        """The widths that a method reads off the statistics."""
        found = METHODS[method]
        given = Given(self.space, self.run.config.importance, statistics_for(self.run, found, progress=False))
        return found(given, self.space.budget(target)).allocation

    def searched(self, first: float, last: float) -> dict[float, list[Allocation]]:
        """The best that the model's own search of 200 evaluations a target finds for two targets, the best first."""
        targets = f"search.targets={{first: {first}, last: {last}, step: {round(last - first, 3)}}}"
        run = Run(self._config(targets), self.work / f"{self.name}-{first}-{last}")
        run.folder.mkdir(parents=True, exist_ok=True)
        run.statistics_file.write_bytes(self.run.statistics_file.read_bytes())
        search_stage(run, Local(), progress=False)
        best = {}
        for found in read_search(run):
            others = sorted(found.evaluations, key=lambda pair: pair[1].worth("divergence"), reverse=True)
            best[found.target] = list(dict.fromkeys([found.best, *(pair[0] for pair in others)]))[:_BEST]
        return best

    def record(self, path: Path) -> dict[str, Any]:
        """The features and damages as plain JSON values, kept in a file."""
        if path.exists():
            return dict(read_json(path))
        features, damages = self.features, self.damages()
        found = {
            "name": self.name,
            "layers": self.space.layers,
            "neurons": self.space.neurons,
            "granularity": self.granularity,
            "curves": features.curves.round(4).tolist(),
            "scalars": features.scalars.round(4).tolist(),
            "damages": [[float(f"{value:.4g}") for value in row] for row in damages],
            "accuracy": self.accuracy(),
        }
        write_json(path, found)
        return found

    def accuracy(self) -> float:
        """The dense model's share of right answers, on the test samples."""
        workshop = self.workshop
        return float(Evaluator(workshop.elastic, workshop.encode(self.run.samples.test)).scores().correct.mean())
