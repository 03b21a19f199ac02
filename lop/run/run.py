"""A run: one model with its samples and settings, and the folder that holds what the stages make of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lop.model.find import SHIPPED, assets, find_model, find_samples, fingerprint_model
from lop.model.image_settings import ImageSettings
from lop.model.samples import Sample, SampleSets, fingerprint_samples, load_sample_sets
from lop.model.sources import check_checkpoint, family_of
from lop.model.tensors import group_parameters, model_size
from lop.run.config import Config
from lop.search.confirmation import kept_back
from lop.search.rewards import REWARDS
from lop.space.allocation import ATTENTION, Attention, Space
from lop.space.size import ModelSize
from lop.storage.destination import check_writable
from lop.storage.files import read_as, write_json
from lop.storage.fingerprint import check_fingerprints
from lop.storage.headers import TensorInfo, read_tensors
from lop.storage.location import Location

# With torch behind them: a prediction takes less time than that import, and needs neither.
if TYPE_CHECKING:
    from lop.model.statistics import NeuronStatistics

# Of a run, the folder of the runs that repeat it with other seeds.
SEEDS = "seeds"
# What stages write, folders with a slash behind.
_MADE = (
    "config.yaml", "statistics.safetensors", "search.json", "seconds.json", "status.json", "predictors.json",
    "features.safetensors", "probes.json", "results.json", "report.md", "tables.json", "tables.md", "ledger/",
    "predictors/", "predictor/", "rivals/", "cells/", "seeds/", "checkpoints/", "tune/", "surveys/",
    "qualities.json", "qualities.png",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Everything that the stages share; each property is read when first asked for.

    Attributes:
        config: the settings.
        folder: where the stages' files are.
        origin: the storage that `folder` is a copy of, if it is one (`lop.storage.mirror`).
    """

    config: Config
    folder: Path
    origin: Location | None = None

    @property
    def location(self) -> Location:
        """Where the files are that others read while a stage runs."""
        return self.origin or Location.parse(self.folder)

    def with_seed(self, seed: int) -> "Run":
        """The run of the same settings with another seed, in a folder of this one."""
        name = f"{SEEDS}/{seed}"
        config = self.config.model_copy(update={"seed": seed})
        return Run(config, self.folder / name, self.origin and self.origin / name)

    def keep(self, file: Path) -> None:
        """Puts a file of the folder where it lasts, at once: a stage of hours may be killed before it ends.

        Raises:
            OSError: the storage cannot be reached.
        """
        if self.origin is not None:
            self.origin.write(file.relative_to(self.folder).as_posix(), file.read_bytes())

    @property
    def checkpoints(self) -> Location:
        """Where checkpoints are written, as they are too large to be copied."""
        return self.location / "checkpoints"

    @property
    def statistics_file(self) -> Path:
        return self.folder / "statistics.safetensors"

    @property
    def spectra_file(self) -> Path:
        return self.folder / "spectra.json"

    def survey_file(self, kind: str) -> Path:
        """Of a survey (`lop.run.surveys`)."""
        return self.folder / f"survey-{kind}.safetensors"

    @property
    def ledger(self) -> Location:
        return self.location / "ledger"

    @property
    def search_file(self) -> Path:
        return self.folder / "search.json"

    @property
    def predictors_folder(self) -> Path:
        return self.folder / "predictors"

    @property
    def predictor_folder(self) -> Path:
        return self.folder / "predictor"

    @property
    def predictor_fingerprint(self) -> str:
        """Of the run's predictor.

        Raises:
            LopError: it is missing or damaged.
        """
        return read_as(self.predictor_folder / "predictor.json", lambda about: str(about["fingerprint"]))

    @property
    def qualities_file(self) -> Path:
        return self.folder / "qualities.json"

    @property
    def report_file(self) -> Path:
        return self.folder / "report.md"

    @cached_property
    def model_folder(self) -> Path:
        """The dense checkpoint.

        Raises:
            LopError: there is no such model, or it is none that LOP can prune.
        """
        folder = find_model(self.config.model)
        check_checkpoint(folder, dense=True)
        return folder

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The dense checkpoint's, by their names.

        Raises:
            LopError: it is damaged.
        """
        return read_tensors(self.model_folder)

    @cached_property
    def size(self) -> ModelSize:
        """The dense checkpoint's numbers.

        Raises:
            LopError: it is damaged.
        """
        return model_size(self.tensors)

    @cached_property
    def settled(self) -> Config:
        """The config with the dtype that a CPU like this one's takes for the model, where that is not float32.

        It is what workers are given and what is recorded, so that all of them compute alike, on whatever CPU.
        """
        config = self.config
        if config.dtype != "auto" or config.gpus_per_worker:
            return config
        from lop.model.adapter import place_and_dtype

        place, dtype = place_and_dtype(config.device, config.dtype, self.model_folder)
        is_settled = place.type == "cpu" and str(dtype) == "torch.bfloat16"
        return config.model_copy(update={"dtype": "bfloat16"}) if is_settled else config

    @cached_property
    def space(self) -> Space:
        """The allocations that the config allows for the model.

        Raises:
            LopError: the granularity does not divide the model's FFN.
        """
        config, size = self.config, self.size
        return Space(
            size.layers,
            size.neurons,
            config.granularity,
            config.max_ratio,
            config.max_width_ratio,
            self._attention if ATTENTION in config.parts else None,
            vanishing=config.min_width == 0,
        )

    def removed_parameters(self, target: float) -> int:
        """How many parameters a target ratio takes from the dense model.

        Raises:
            LopError: the target is out of the space's reach.
        """
        lost = self.space.whole - self.space.budget(target)
        return lost if self.space.attention else lost * self.size.neuron_parameters

    @property
    def _attention(self) -> Attention:
        folder = self.model_folder
        groups = read_as(folder / "config.json", family_of(folder).text_config)["num_key_value_heads"]
        held = group_parameters(self.tensors, groups)
        return Attention(groups, held, self.size.neuron_parameters)

    @cached_property
    def samples(self) -> SampleSets:
        """The three disjoint sets of samples.

        Raises:
            LopError: they are missing, damaged or not disjoint.
        """
        return load_sample_sets(find_samples(self.config.samples))

    @cached_property
    def searched_samples(self) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
        """The reward samples that a search sees, and those that are kept back to confirm its answer."""
        settings, samples = self.config.search.confirm, self.samples.reward
        if settings is None or len(samples) < 2:
            return samples, ()
        return kept_back(samples, settings.share, seed=self.config.seed)

    @cached_property
    def model_fingerprint(self) -> str:
        return fingerprint_model(self.model_folder)

    @cached_property
    def calibration_fingerprints(self) -> dict[str, str]:
        """What the statistics depend on."""
        return {"model": self.model_fingerprint, "calibration samples": self._fingerprint(self.samples.calibration)}

    @cached_property
    def statistics(self) -> "NeuronStatistics":
        """What `lop calibrate` wrote.

        Raises:
            LopError: it is missing or damaged, or belongs to another model or other samples.
        """
        from lop.model.statistics import load_statistics

        statistics, found = load_statistics(self.statistics_file)
        check_fingerprints(str(self.statistics_file), found, self.calibration_fingerprints)
        return statistics

    def surveyed(self, kinds: Iterable[str]) -> "NeuronStatistics":
        """The statistics with what surveys of some kinds found.

        Raises:
            LopError: the statistics or a survey are missing or damaged, or belong to another model or other samples.
        """
        from lop.model.statistics import load_survey

        found: dict[str, np.ndarray] = {}
        for kind in kinds:
            found |= load_survey(self.survey_file(kind), self.calibration_fingerprints)[0]
        return replace(self.statistics, surveys=found) if found else self.statistics

    def survey_seconds(self, kind: str) -> float:
        """What a survey took."""
        from lop.model.statistics import load_survey

        return load_survey(self.survey_file(kind), self.calibration_fingerprints)[1]

    def order_by(self, name: str) -> np.ndarray:
        """[L, F] neurons of each layer by an importance, the most important first.

        Raises:
            LopError: what it reads is missing.
        """
        from lop.model.importance import SURVEYS_OF, importance, order

        return order(importance(name, self.surveyed(SURVEYS_OF.get(name, ()))))

    def groups_by(self, name: str) -> np.ndarray | None:
        """[L, K] groups of each layer's attention by an importance, the first kept longest; None if it is not open.

        Raises:
            LopError: what it reads is missing, or of FFNs alone.
        """
        from lop.model.importance import SURVEYS_OF, of_groups, order

        if self.space.attention is None:
            return None
        return order(of_groups(self.surveyed(SURVEYS_OF.get(name, ())), name))

    @cached_property
    def order(self) -> np.ndarray:
        """[L, F] neurons of each layer by the config's importance, the most important first."""
        return self.order_by(self.config.importance)

    @cached_property
    def group_order(self) -> np.ndarray | None:
        """[L, K] groups of each layer's attention, the most important first; None where attention is not open."""
        return self.groups_by(self.config.importance)

    @property
    def arithmetic(self) -> str:
        """What rounding depends on."""
        config = self.settled
        found = f"{config.device} {config.dtype}, {config.threads} threads, {config.batch_tokens} tokens"
        if config.images.batch_patches != ImageSettings().batch_patches:
            found += f", {config.images.batch_patches} patches"
        return f"{found}, compiled" if config.compile else found

    @cached_property
    def evaluation_fingerprints(self) -> dict[str, str]:
        """What an allocation's reward depends on."""
        config = self.settled
        arithmetic = self.arithmetic
        if races := config.search.racing:
            arithmetic += f", {races.rounds} rounds of seed {config.seed}, confidence {races.confidence}"
            if not REWARDS[config.search.reward].is_count:
                arithmetic += f", for {config.search.reward}"
        # Only where there is one, so that searches from before allocations were scored so keep their fingerprint.
        scored = {} if config.scored_recovery == "none" else {"recovery": config.scored_recovery}
        if self.space.attention:
            scored["parts"] = " and ".join(config.parts)
        if config.search.confirm:
            scored["kept back"] = f"{config.search.confirm.share} of the reward samples, by seed {config.seed}"
        return {
            **scored,
            **self.calibration_fingerprints,
            "reward samples": self._fingerprint(self.samples.reward),
            "importance": config.importance,
            "arithmetic": arithmetic,
        }

    @cached_property
    def ledger_fingerprints(self) -> dict[str, str]:
        """What a recorded evaluation depends on, and `Space.shape`."""
        found = {**self.evaluation_fingerprints, "shape": self.space.shape}
        if self.config.search.needs_divergence:
            found["set of measures"] = "with divergence"  # Which others lack.
        return found

    def check_writable(self) -> None:
        """Looks before there is work to lose whether what stages make can be written.

        Raises:
            LopError: the folder cannot be written, or something is in the way of a file of the run.
        """
        check_writable(self.location, *_MADE)

    def _fingerprint(self, samples: Sequence[Sample]) -> str:
        return fingerprint_samples(samples, max_pixels=self.config.images.max_pixels)

    def seconds(self) -> dict[str, float]:
        """Seconds that each stage has taken so far, interrupted runs included."""
        path = self.folder / "seconds.json"
        return read_as(path, dict) if path.exists() else {}

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Adds to the time that a stage has taken."""
        spent = self.seconds()
        write_json(self.folder / "seconds.json", {**spent, stage: spent.get(stage, 0) + seconds})


def shipped_run(config: Config) -> Run | None:
    """The run that comes with the package for the config's model, if there is one."""
    folder = assets(config.model) / "run"
    return Run(config, folder) if config.model in SHIPPED and folder.is_dir() else None
