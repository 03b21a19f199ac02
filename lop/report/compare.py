"""LOP against the baselines on the test samples: same neurons, same budgets, accuracies with intervals, seconds."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from lop.checkpoint.recoveries import RECOVERIES, Recovery
from lop.checkpoint.recovery import recover_elastic
from lop.methods.method import Need, Seconds, Side
from lop.methods.registry import EVERY, IN_REPORT, METHODS, RESHAPINGS
from lop.model.encoding import Encoded
from lop.model.samples import FORMS, Sample, check_answers, fingerprint_samples
from lop.model.statistics import calibrate
from lop.report.cells import own_of_reshaping, own_recovery
from lop.report.entries import Found, given
from lop.report.intervals import Interval, paired_bootstrap, wilson
from lop.run.building import Materials, Workshop
from lop.run.run import Run
from lop.run.surveys import extra_seconds
from lop.search.scoring import Scoring
from lop.space.allocation import Allocation, dense
from lop.storage.fingerprint import fingerprint, fingerprint_file


@dataclass(frozen=True)
class Row:
    """One method at one target on the test samples of one form; `low` and `high` are Wilson's 95% interval."""

    method: str
    target: float
    form: str
    correct: int
    total: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Average:
    """One method at one target: the mean over forms, with the paired difference to the best baseline there."""

    method: str
    target: float
    widths: tuple[int, ...]
    accuracy: Interval
    best_baseline: str
    difference: Interval


@dataclass(frozen=True)
class Recovered:
    """One method's allocation at one target with a recovery.

    Attributes:
        accuracy: the mean over forms.
        differences: to each recovery that stands before it in the config, paired on the same questions.
    """

    method: str
    target: float
    recovery: Recovery
    accuracy: Interval
    differences: Mapping[Recovery, Interval]


@dataclass(frozen=True)
class Spent:
    """What a method takes, medians over targets."""

    method: str
    seconds: Seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"method": self.method, **asdict(self.seconds)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Spent":
        """The inverse of `as_dict`."""
        values = dict(data)
        method = values.pop("method")
        if "apply" in values:  # Earlier comparisons timed what is sorting and what is pruning as one.
            values = {**values, "sort": 0.0, "prune": values["apply"]}
            del values["apply"]
        return cls(method, Seconds(**values))


@dataclass(frozen=True)
class Comparison:
    """All of `lop compare`'s results, with the fingerprints of what they were made from."""

    fingerprints: Mapping[str, str]
    rows: tuple[Row, ...]
    averages: tuple[Average, ...]
    recoveries: tuple[Recovered, ...]
    seconds: tuple[Spent, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = ("rows", "averages", "recoveries")
        lists = {name: [asdict(value) for value in getattr(self, name)] for name in names}
        spent = [value.as_dict() for value in self.seconds]
        return {"fingerprints": dict(self.fingerprints), **lists, "seconds": spent}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Comparison":
        """The inverse of `as_dict`."""

        def average(values: dict[str, Any]) -> Average:
            intervals = {name: Interval(**values[name]) for name in ("accuracy", "difference")}
            return Average(**{**values, **intervals, "widths": tuple(values["widths"])})

        def recovered(values: dict[str, Any]) -> Recovered:
            differences = {name: Interval(**value) for name, value in values["differences"].items()}
            return Recovered(**{**values, "accuracy": Interval(**values["accuracy"]), "differences": differences})

        return cls(
            fingerprints=data["fingerprints"],
            rows=tuple(Row(**row) for row in data["rows"]),
            averages=tuple(average(values) for values in data["averages"]),
            recoveries=tuple(map(recovered, data["recoveries"])),
            seconds=tuple(map(Spent.from_dict, data["seconds"])),
        )


def compared_methods(run: Run) -> tuple[str, ...]:
    """The methods that the config names, or the usual, in the registry's order."""
    named = run.config.compare.methods or IN_REPORT
    return tuple(name for name in EVERY if name in named)


def compare(run: Run, found: Mapping[str, Found] | None = None, *, progress: bool = True) -> Comparison:
    """Evaluates every method at every target of the config, and with every recovery at those meant for it.

    Args:
        found: by method what its own search has found.

    Raises:
        LopError: the search or the training has not been run, or a target was not searched.
    """
    config = run.config
    # What is compared is right answers: prose has none.
    check_answers(run.samples.test, "the comparison counts right answers in the test samples")
    questions = asked(run)
    workshop = Workshop(Materials.of(run))
    calibrate_seconds, calibration = _time_calibration(run, workshop)
    elastic = workshop.elastic
    scoring = Scoring(elastic.backbone, workshop.encode(questions))

    recover = partial(recover_elastic, elastic, means=run.statistics.mean, calibration=calibration)
    methods = [name for name in compared_methods(run) if name in METHODS]
    known = {name: given(run, METHODS[name], found=(found or {}).get(name), progress=progress) for name in methods}
    hits = {("dense", 0.0): scoring.scores().correct}
    widths = {("dense", 0.0): dense(run.space).widths}
    spent: dict[str, list[Seconds]] = {name: [] for name in methods}
    extra = {name: extra_seconds(run, METHODS[name].needs) for name in methods}
    recovered: dict[tuple[str, float, Recovery], np.ndarray] = {}
    scores: dict[tuple[str, Allocation, Recovery], np.ndarray] = {}

    def scored(importance: str, allocation: Allocation, recovery: Recovery, *, is_there: bool = False) -> np.ndarray:
        # LOP's search and predictor often choose the same.
        key = (importance, allocation, recovery)
        if key not in scores:
            if not is_there:
                recover(allocation, recovery)
            scores[key] = scoring.scores().correct
        return scores[key]

    targets, recoveries = config.compare.targets, config.compare.recoveries
    recovery_targets = config.compare.recovery_targets if recoveries else ()
    pairs = [(name, target) for target in dict.fromkeys((*targets, *recovery_targets)) for name in methods]
    for name, target in tqdm(pairs, desc="compare", unit="method", disable=not progress):
        choice = METHODS[name](known[name], run.space.budget(target))
        own = own_recovery(run.config.scored_recovery, bias=choice.bias)
        start = time.perf_counter()
        elastic.sort(run.order_by(choice.importance), run.groups_by(choice.importance))
        sorted_at = time.perf_counter()
        if target in targets:
            recover(choice.allocation, own)
            first = calibrate_seconds if Need.ACTIVATIONS in METHODS[name].needs else 0.0
            pruned = time.perf_counter() - sorted_at
            spent[name].append(Seconds(first + extra[name], choice.seconds, sorted_at - start, pruned))
            hits[name, target] = scored(choice.importance, choice.allocation, own, is_there=True)
            widths[name, target] = choice.allocation.widths
        if target in recovery_targets:
            for recovery in recoveries:
                recovered[name, target, recovery] = scored(choice.importance, choice.allocation, recovery)
        elastic.restore()
    for name, target, recovery in tqdm(_reshapings(run), desc="reshape", unit="method", disable=not progress):
        start = time.perf_counter()
        removed = run.removed_parameters(target)
        made = RESHAPINGS[name].reshape(elastic.backbone, calibration, removed, RECOVERIES[recovery].refits)
        seconds = time.perf_counter() - start
        correct = Scoring(made.backbone, scoring.encoded).scores().correct
        if target in targets and recovery == own_of_reshaping(config.scored_recovery, name):
            spent.setdefault(name, []).append(Seconds(0.0, seconds, 0.0, 0.0))
            hits[name, target], widths[name, target] = correct, (run.space.neurons,) * len(made.backbone.layers)
        if target in recovery_targets and recovery in recoveries:
            recovered[name, target, recovery] = correct
    return Comparison(
        fingerprints=comparison_fingerprints(run),
        rows=tuple(row for (name, target), correct in hits.items() for row in _rows(questions, name, target, correct)),
        averages=tuple(_averages(questions, hits, widths)),
        recoveries=tuple(_recoveries(questions, recovered)),
        seconds=tuple(Spent(name, _medians(each)) for name, each in spent.items()),
    )


def _reshapings(run: Run) -> list[tuple[str, float, Recovery]]:
    """Those of the compared methods that reshape the model, at every target, with each recovery they have there."""
    settings = run.config.compare
    found: list[tuple[str, float, Recovery]] = []
    for name in compared_methods(run):
        if name in RESHAPINGS:
            able = ("none", "refit") if RESHAPINGS[name].refits else ("none",)
            found += [(name, target, own_of_reshaping(run.config.scored_recovery, name)) for target in settings.targets]
            wanted = [recovery for recovery in able if recovery in settings.recoveries]
            found += [(name, target, recovery) for target in settings.recovery_targets for recovery in wanted]
    return list(dict.fromkeys(found))


def asked(run: Run) -> tuple[Sample, ...]:
    """The test questions that are compared on: prose is neither right nor wrong."""
    questions = [sample for sample in run.samples.test if not sample.is_prose]
    most = min(run.config.compare.limit or len(questions), len(questions))
    drawn = np.random.default_rng(run.config.seed).permutation(len(questions))[:most]
    return tuple(questions[index] for index in sorted(drawn))


def _medians(spent: Sequence[Seconds]) -> Seconds:
    names = ("calibrate", "allocate", "sort", "prune")
    return Seconds(*(statistics.median(getattr(each, name) for each in spent) for name in names))


def comparison_fingerprints(run: Run) -> dict[str, str]:
    """What a comparison depends on."""
    settings = run.config.search.recorded_of_rivals()
    searching = any(METHODS[name].search for name in compared_methods(run) if name in METHODS)
    return {
        **run.evaluation_fingerprints,
        # Comparisons from before all methods had what the search scores with lack this.
        **({"compared with": run.config.scored_recovery} if run.config.scored_recovery != "none" else {}),
        # Only where a method searches, so that comparisons from before any could keep theirs.
        **({"rivals": fingerprint([settings, run.config.seed])} if searching else {}),
        "space": fingerprint(run.space.as_dict()),
        "test samples": fingerprint_samples(run.samples.test),
        "search": fingerprint_file(run.search_file),
        "predictor": fingerprint_file(run.predictor_folder / "predictor.json"),
        "targets": fingerprint(run.config.compare.model_dump(mode="json", exclude_none=True)),
    }


def _time_calibration(run: Run, workshop: Workshop) -> tuple[float, Encoded]:
    start = time.perf_counter()
    encoded = workshop.encode(run.samples.calibration)
    calibrate(workshop.model, encoded)
    return time.perf_counter() - start, encoded


def _rows(samples: Sequence[Sample], method: str, target: float, correct: np.ndarray) -> list[Row]:
    forms = np.array([sample.form for sample in samples])
    rows = []
    for form in FORMS:
        chosen = correct[forms == form]
        if len(chosen):
            share = wilson(int(chosen.sum()), len(chosen))
            rows.append(Row(method, target, form, int(chosen.sum()), len(chosen), share.value, share.low, share.high))
    return rows


def _averages(
    samples: Sequence[Sample],
    hits: Mapping[tuple[str, float], np.ndarray],
    widths: Mapping[tuple[str, float], tuple[int, ...]],
) -> list[Average]:
    interval = bootstrap(samples)
    accuracies = {key: interval(correct) for key, correct in hits.items()}
    averages = []
    for (method, target), correct in hits.items():
        mine = [name for name, at in hits if at == target and name in EVERY]
        baselines = [name for name in mine if EVERY[name].side is Side.BASELINE]
        best = max(baselines or [method], key=lambda name: accuracies[name, target].value)
        difference = interval(correct.astype(np.int64) - hits[best, target].astype(np.int64))
        averages.append(Average(method, target, widths[method, target], accuracies[method, target], best, difference))
    return averages


def _recoveries(
    samples: Sequence[Sample], hits: Mapping[tuple[str, float, Recovery], np.ndarray]
) -> Iterator[Recovered]:
    interval = bootstrap(samples)
    earlier: dict[tuple[str, float], dict[Recovery, np.ndarray]] = {}
    for (method, target, recovery), correct in hits.items():
        others = earlier.setdefault((method, target), {})
        number = correct.astype(np.int64)
        differences = {other: interval(number - value) for other, value in others.items()}
        others[recovery] = number
        yield Recovered(method, target, recovery, interval(correct), differences)


def bootstrap(samples: Sequence[Sample]) -> Callable[[np.ndarray], Interval]:
    """The mean over forms of a value for each sample [n], with its interval over images."""
    forms = np.unique([sample.form for sample in samples], return_inverse=True)[1]
    images = np.unique([sample.image_key for sample in samples], return_inverse=True)[1]
    return lambda values: paired_bootstrap(values.astype(np.float64), forms, images)
