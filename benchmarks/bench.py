"""A model, what methods choose for it, and what the choices say to its test items, each kept as a cell.

All methods keep equally many neurons and may score as many reward tokens as LOP's search did. All allocations are
scored on the same test items, drawn once by a fixed seed, with the refit that one factor a layer gives every width
(`lop.model.repair`), in the method's own order of neurons.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from cells import cell

from lop.checkpoint.recoveries import RECOVERIES, Recovery
from lop.checkpoint.recovery import CATCH_UP, refit
from lop.methods.lop_predictor import METHOD as LOP_PREDICTOR
from lop.methods.lop_search import METHOD as LOP_SEARCH
from lop.methods.method import Given, Reward, Root
from lop.methods.puzzletron import METHOD as PUZZLETRON_METHOD
from lop.methods.puzzletron import library
from lop.methods.registry import METHODS
from lop.model.backbone import Heads
from lop.model.elastic import ElasticFfn, Repair
from lop.model.repair import Biases, Refits, factor, factors
from lop.model.samples import Sample, fingerprint_samples
from lop.predictor.general import General, load_general
from lop.predictor.general_training import leave_one_out
from lop.report.intervals import Interval, keyed_bootstrap
from lop.run.building import Materials, Workshop
from lop.run.config import Config, find_config, load_config
from lop.run.features import features_file
from lop.run.prediction import open_predictor
from lop.run.run import Run
from lop.run.surveys import SURVEYS, statistics_for
from lop.search.evaluator import Evaluator
from lop.search.loop import InProcess
from lop.search.racing import Candidate, pack_values, unpack_values
from lop.search.scoring import Scoring
from lop.space.allocation import Allocation
from lop.stages.calibrate import calibrate_stage, features_stage
from lop.stages.local import Local
from lop.stages.probe import probe_stage
from lop.stages.rivals import rivals_stage
from lop.stages.search import search_stage
from lop.stages.surveys import survey_stage
from lop.stages.train import train_stage
from lop.storage.files import read_json, write_json
from lop.storage.fingerprint import fingerprint

LOP, PREDICTOR, PUZZLETRON, REFIT = LOP_SEARCH.name, LOP_PREDICTOR.name, PUZZLETRON_METHOD.name, "refit"
# The refit that an export makes: layer by layer, on what the layers before say.
Exported = Literal["exported"]
(EXPORTED,) = get_args(Exported)
# What LOP's predictor learns from: its searches at these ratios.
LEARNT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
_DESCENT = "search.descent={rounds: 3}"
_LONG = "search.evaluations=200", "search.simulations=400"
LOP_GENERAL = "lop-general"
SURGEON = "lop-surgeon"
# LOP's search by other settings: ideas of methods that it was not ahead of.
LOPS = {
    LOP: (),
    "lop-descent": ("search.evaluations=8", "search.simulations=16", _DESCENT),
    "lop-taylor": ("importance=taylor",),
    "lop-taylor-descent": ("importance=taylor", "search.evaluations=8", "search.simulations=16", _DESCENT),
    SURGEON: ("importance=surgeon",),
    "lop-surgeon-200": ("importance=surgeon", *_LONG),
    "lop-surgeon-puzzletron": ("importance=surgeon",),
    "lop-surgeon-scan-200": ("importance=surgeon", "search.roots=[wanda, flap, sensitivity]", *_LONG),
    "lop-puzzletron": ("search.roots=[wanda, flap, puzzletron]", "tables.rivals=[puzzletron]"),
    "lop-200": _LONG,
    LOP_GENERAL: ("search.roots=[wanda, flap, general]",),
}
# What LOP's searches at all of `LEARNT` have found, blended with their neighbours', and what learns from that.
BLENDED, BLENDED_PREDICTOR = "lop-blended", "lop-blended-predictor"
# What the general predictor says after so many evaluations: had it not learnt from the model, and as it ships.
UNSEEN = {"lop-probes-10": 10, "lop-probes-30": 30}
PROBED = {**UNSEEN, "lop-probes-30-shipped": 30}
# Puzzletron over neurons in another order than LOP's own by default: by the norm of what a neuron adds to the residual
# stream, as its published code ranks them, and the surgeon's.
REORDERED = {"puzzletron-contribution": "contribution", "puzzletron-surgeon": "surgeon"}
# Forms of LOP's search that start from what another method has chosen, which counts as spent.
_STARTED = {"lop-surgeon-puzzletron": "puzzletron-surgeon"}
# The same search, scoring widths as they are without any recovery.
UNREFITTED = "lop-unrefitted"
_FORMS = {**LOPS, UNREFITTED: ("search.recovery=none",)}
_ITEMS = 800
# LOP's importance is the paper's for all but the forms that name another: `smol`'s config has the surgeon's.
_SETTINGS = (
    "importance=activation",
    "search.evaluations=24",
    "search.simulations=48",
    "search.racing={}",
    "search.roots=[wanda, flap]",
    "search.sensitivity_levels=3",
    "workers=0",
)
# `tiny`'s config is that of the run that ships, which was searched as the paper does.
_AS_NOW = ("search.method=guided", "search.recovery=refit", "search.confirm={}", "search.reward=divergence")


@dataclass(frozen=True)
class Chosen:
    """What a method chose.

    Attributes:
        tokens: reward tokens that its search scored; 0 if it does not search.
        unraced: that it would have scored without races; 0 if it has none, or it is not known.
    """

    method: str
    ratio: float
    widths: tuple[int, ...]
    importance: str
    tokens: int
    seconds: float
    unraced: int = 0


class FixedWeights:
    """A repair whose weights are there already.

    Args:
        weights: each layer's [H, k].
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self._weights = weights

    def __call__(self, axis: int, part: ElasticFfn | Heads) -> None:
        """Sets the weights."""
        assert isinstance(part, ElasticFfn)
        part.refitted = self._weights[axis]


class Bench:
    """A model and what is measured with it, each made when it is first needed.

    Args:
        model: `tiny` or `smol`.
        folder: of the runs of LOP's searches, which go on where they were stopped.
        results: where cells are looked for; those that are missing are made and written to the first.
        all_items: choices are scored on all test items, not on those drawn; these scores are cells of their own.
    """

    def __init__(
        self, model: str, folder: Path, seed: int, results: Sequence[Path], *, all_items: bool = False
    ) -> None:
        self.model, self.seed, self.all_items = model, seed, all_items
        self._folder, self._results = folder, results
        self.run = Run(self._config(0.5), folder / "calibration")
        calibrate_stage(self.run)

    def _config(self, ratio: float, *changed: str, last: float | None = None) -> Config:
        """Of a search of one target, or of all from it to the last, with what it may start from."""
        asked = f"search.targets={{first: {ratio}, last: {last or ratio}, step: 0.1}}"
        targets = asked, f"tables.targets=[{ratio}]"
        settings = [
            *_SETTINGS,
            *(_AS_NOW if self.model == "tiny" else ()),
            *targets,
            f"seed={self.seed}",
            *changed,
        ]
        return load_config(find_config(self.model), settings)

    @cached_property
    def workshop(self) -> Workshop:
        """The model."""
        return Workshop(Materials.of(self.run))

    @cached_property
    def factors(self) -> list[torch.Tensor]:
        """Each layer's, in the order of the run's importance."""
        self.workshop.elastic.sort(self.run.order, self.run.group_order)
        encoded = self.workshop.encode(self.run.samples.calibration)
        return factors(self.workshop.elastic.backbone, encoded, attention=self.run.space.attention is not None)

    @cached_property
    def items(self) -> list[Sample]:
        """The test items that allocations are scored on."""
        return list(self.run.samples.test) if self.all_items else self._drawn

    @cached_property
    def _drawn(self) -> list[Sample]:
        test = self.run.samples.test
        chosen = np.random.default_rng(0).permutation(len(test))[:_ITEMS]
        return [test[index] for index in sorted(chosen)]

    @cached_property
    def made_from(self) -> str:
        """What the cells depend on."""
        run = self.run
        return fingerprint([run.calibration_fingerprints, run.config.importance, fingerprint_samples(self._drawn)])

    @cached_property
    def _scored_from(self) -> str:
        """What the cells of scores depend on."""
        return fingerprint([self.made_from, fingerprint_samples(self.items)]) if self.all_items else self.made_from

    def choose(self, method: str, ratio: float) -> Chosen:
        """A method's cell at a ratio."""

        def make() -> dict[str, Any]:
            if method in _FORMS:
                return asdict(self._search(method, ratio))
            if method in PROBED:
                return asdict(self._probed(method, ratio))
            if method == BLENDED:
                return asdict(self._blended(ratio))
            if method == BLENDED_PREDICTOR:
                return asdict(self._answered(BLENDED_PREDICTOR, self._blended_run(), ratio))
            if method == PREDICTOR:
                return asdict(self._predicted(ratio))
            if method in REORDERED:
                found = self._rival(PUZZLETRON, ratio, self.choose(LOP, ratio).tokens, REORDERED[method])
                return asdict(replace(found, method=method))
            if METHODS[method].search:
                return asdict(self._rival(method, ratio, self.choose(LOP, ratio).tokens))
            return asdict(self._read(method, ratio))

        found = self.cell(f"choice-{method}-{ratio}-{self.seed}.json", make)
        del found["made_from"]
        return Chosen(**{**found, "widths": tuple(found["widths"])})

    def scored(self, chosen: Chosen, recovery: Recovery | Exported = REFIT) -> dict[str, Any]:
        """An allocation's cell."""
        name = fingerprint([chosen.importance, chosen.widths])
        other = "" if recovery == REFIT else f"{recovery}-"
        return self.measured(f"score-{other}{name}.json", lambda: self.score(chosen, recovery))

    def result(
        self, method: str, ratio: float, recovery: Recovery | Exported = REFIT
    ) -> tuple[Chosen, np.ndarray, float]:
        """What a method chose at a ratio, the KL [n] of each item, and the share of questions answered right."""
        chosen = self.choose(method, ratio)
        found = self.scored(chosen, recovery)
        asked = np.array([not sample.is_prose for sample in self.items])
        return chosen, unpack_values(found["divergence"]), float(unpack_values(found["hits"])[asked].mean())

    def score(self, chosen: Chosen, recovery: Recovery | Exported = REFIT) -> dict[str, Any]:
        """What an allocation says to the test items."""
        dense = self._dense
        if recovery == EXPORTED:
            repair: Repair | None = self.exported(chosen.importance, chosen.widths)
        else:
            repair = self.repair(chosen.importance, recovery)
        with self.workshop.elastic.pruned(Allocation(chosen.widths), repair):
            found = self._scoring.scores(dense)
        return {"divergence": pack_values(found.divergence), "hits": pack_values(found.correct)}

    @cached_property
    def _scoring(self) -> Scoring:
        """Of the test items."""
        return Scoring(self.workshop.elastic.backbone, self.workshop.encode(self.items))

    @cached_property
    def _dense(self) -> list[torch.Tensor]:
        """What the model says to them while nothing of it is pruned."""
        return self._scoring.all_tails()

    def interval(self, values: np.ndarray) -> Interval:
        """The mean of a value for each item [n], with the 95% interval of a bootstrap over images and texts."""
        return keyed_bootstrap(values, [sample.keys[0] for sample in self.items])

    def check(
        self, count: int, methods: Sequence[str], recoveries: Sequence[Recovery | Exported] = (REFIT,)
    ) -> Iterator[bool]:
        """Makes scores of some methods again, chosen at random, and says whether they agree, item by item.

        On another machine than made them, items may differ in bfloat16; how much is printed.
        """
        paths = [path for folder in self._results for path in sorted(folder.glob(f"choice-*-{self.seed}.json"))]
        records = [record for record in map(read_json, paths) if record["method"] in methods]
        pairs = [(record, recovery) for record in records for recovery in recoveries]
        for index in np.random.default_rng().permutation(len(pairs))[:count]:
            record, recovery = pairs[index]
            chosen = self.choose(record["method"], record["ratio"])
            both = self.scored(chosen, recovery), self.score(chosen, recovery)
            known, again = (unpack_values(found["divergence"]) for found in both)
            apart = np.abs(again - known)
            told = f"KL {known.mean():.4f}, again {again.mean():.4f}"
            items = f"items apart by {np.median(apart):.4f} (median) to {apart.max():.4f}"
            print(f"{chosen.method} at {chosen.ratio:.0%}, {recovery}: {told}; {items}")
            yield bool(np.allclose(known, again, rtol=0.02, atol=0.02))

    def cell(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a cell holds, which is looked for in all folders."""
        return cell(self._file(name), self.made_from, make)

    def measured(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The same of what the items are asked for."""
        return cell(self._file(f"all/{name}" if self.all_items else name), self._scored_from, make)

    def _file(self, name: str) -> Path:
        there = [folder / name for folder in self._results if (folder / name).exists()]
        return (there or [self._results[0] / name])[0]

    def repair(self, name: str, recovery: Recovery = REFIT) -> Repair | None:
        """Sorts the model by an importance, and gives what mends it in that order."""
        run = self.run
        if name != run.config.importance:
            survey_stage(run, Local(), [method.name for method in METHODS.values() if method.importance == name])
        ranked, groups = run.order_by(name), run.groups_by(name)
        known = self.factors if RECOVERIES[recovery].refits else []
        self.workshop.elastic.sort(ranked, groups)
        if not known:
            return Biases(run.statistics.mean) if RECOVERIES[recovery].adds_bias else None
        moves = [np.argsort(ours)[theirs] for ours, theirs in zip(run.order, ranked, strict=True)]
        if groups is not None and run.group_order is not None:
            held = np.arange(len(known[-1]) // groups.shape[1])  # Columns of a group.
            orders = zip(run.group_order, groups, strict=True)
            moves += [((np.argsort(ours)[theirs] * len(held))[:, None] + held).ravel() for ours, theirs in orders]
        made = [
            c if np.array_equal(move, range(len(move))) else _reordered(c, torch.from_numpy(move))
            for c, move in zip(known, moves, strict=True)
        ]
        return Refits(made, cache_bytes=1 << 30)

    def exported(self, importance: str, widths: Sequence[int], catch_up: float = CATCH_UP) -> FixedWeights:
        """Sorts the model by an importance, and gives FFNs of these widths the weights that an export does.

        Args:
            catch_up: as in `lop.checkpoint.recovery.refit`.
        """
        self.repair(importance, "none")
        elastic = self.workshop.elastic
        encoded = self.workshop.encode(self.run.samples.calibration)
        made = refit(elastic.backbone, elastic.backbone.layers, encoded, widths, catch_up=catch_up)
        weights = [found.down.clone() for found in made]
        elastic.restore()
        return FixedWeights(weights)

    def _search(self, name: str, ratio: float) -> Chosen:
        """LOP's own, by the settings of that name."""
        before = [self.choose(_STARTED[name], ratio)] if name in _STARTED else []
        start = [f"search.start={self._answers(f'{ratio}-{each.method}', [each])}" for each in before]
        run = Run(self._config(ratio, *_FORMS[name], *start), self.search_folder(ratio, name))
        survey_stage(self.run, Local(), [m.name for m in METHODS.values() if m.importance == run.config.importance])
        if any(METHODS[root].root is Root.PREDICTED for root in run.config.search.roots):
            features_stage(self.run)
        self._share(run, features_file(self.run), *map(self.run.survey_file, SURVEYS))
        roots = [name for name in run.config.search.roots if METHODS[name].root is Root.FOUND]
        outcomes = rivals_stage(run, Local(), rivals=roots, targets=[ratio], progress=False) if roots else []
        search_stage(run, Local(), progress=False)
        (found,) = read_json(run.search_file)["targets"]
        spent, spared = self._spent(run, found)
        # What roots were found with was spent, too.
        spent += sum(outcome.curve[-1][0] for outcome in outcomes) * self._tokens(run.samples.reward)[0]
        spent += sum(each.tokens for each in before)
        seconds = run.seconds()["search"] + sum(each.seconds for each in (*outcomes, *before))
        widths, unraced = tuple(found["best"]["widths"]), round(spent + spared)
        return Chosen(name, ratio, widths, run.config.importance, round(spent), seconds, unraced)

    def _spent(self, run: Run, found: dict[str, Any]) -> tuple[float, float]:
        """Reward tokens that a target's search scored, and those that its races spared."""
        search, back = (self._tokens(part) for part in run.searched_samples)
        shares = [entry.get("scored", search[1]) / search[1] for entry in found["evaluations"]]
        spent, spared = search[0] * sum(shares), search[0] * (len(shares) - sum(shares))
        spent += len(found["confirmed"]) * back[0]
        return spent + found.get("descent", {}).get("scored", 0) / search[1] * search[0], spared

    def _blended(self, ratio: float) -> Chosen:
        """A target's answer of `_blended_run`."""
        run, mine = self._blended_run(), self.choose(LOP, ratio)
        (found,) = (each for each in read_json(run.search_file)["targets"] if each["target"] == ratio)
        spent, spared = self._spent(run, found)
        seconds = run.seconds()["search"] / len(LEARNT)
        tokens = round(mine.tokens + spent)
        unraced = round(mine.unraced + spent + spared) if mine.unraced else 0
        widths = tuple(found["best"]["widths"])
        return Chosen(BLENDED, ratio, widths, run.config.importance, tokens, mine.seconds + seconds, unraced)

    def _blended_run(self) -> Run:
        """All of LOP's searches together: a search of two evaluations a target that starts from each one's answer."""
        start = self._answers("answers", [self.choose(LOP, each) for each in LEARNT])
        # Of each target two are learnt from: what else is known of it by now is the uniform allocation.
        few = "search.evaluations=2", "train.best_per_target=2"
        changed = f"search.start={start}", "search.roots=[]", "search.blends=2", *few
        run = Run(self._config(LEARNT[0], *changed, last=LEARNT[-1]), self._folder / f"{self.seed}-blended")
        self._share(run)
        search_stage(run, Local(), progress=False)
        return run

    def _answers(self, name: str, found: Sequence[Chosen]) -> Path:
        """A folder with what searches have found, for `search.start`."""
        folder = self._folder / f"{self.seed}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        answers = [{"best": {"widths": list(each.widths)}} for each in found]
        made_from = {"model": self.run.model_fingerprint}
        write_json(folder / self.run.search_file.name, {"fingerprints": made_from, "targets": answers})
        return folder

    def _share(self, run: Run, *more: Path) -> None:
        """Gives another run this one's statistics, and what there is of other files."""
        run.folder.mkdir(parents=True, exist_ok=True)
        for mine in (self.run.statistics_file, *more):
            if mine.exists():
                (run.folder / mine.name).write_bytes(mine.read_bytes())

    def _unseen(self) -> General:
        """The general predictor, had it not learnt from this model."""
        # Where it is needed: scripts of training are no part of what is installed.
        from training.zoo.data import load_members
        from training.zoo.fit import RULE

        return leave_one_out(load_general().kind, load_members(), rule=RULE)[self.model]

    def _probed(self, name: str, ratio: float) -> Chosen:
        """What the general predictor says after evaluations for a ratio, of which none was made for another."""
        run = Run(self._config(ratio), self.search_folder(ratio, name))
        features_stage(self.run)
        self._share(run, features_file(self.run))
        found = probe_stage(
            run, Local(), PROBED[name], ratio, general=self._unseen() if name in UNSEEN else None, progress=False
        )
        widths = found.best[run.space.budget(ratio)].widths
        tokens = found.evaluations * self._tokens(run.searched_samples[0])[0]
        return Chosen(name, ratio, widths, run.config.importance, tokens, run.seconds()["probe"])

    def search_folder(self, ratio: float, name: str = LOP) -> Path:
        """Of LOP's search at a ratio, by the settings of that name."""
        return self._folder / f"{self.seed}-{ratio}{'' if name == LOP else f'-{name}'}"

    def _tokens(self, samples: Sequence[Sample]) -> tuple[int, int]:
        """Tokens and samples."""
        return sum(map(len, self.workshop.encode(samples).batches)), len(samples)

    def _predicted(self, ratio: float) -> Chosen:
        """By the predictor that learnt from LOP's searches."""
        run = Run(self._config(LEARNT[0], last=LEARNT[-1]), self._folder / f"{self.seed}-all")
        self._share(run)
        searches = []
        for searched in LEARNT:
            if not (file := self.search_folder(searched) / run.search_file.name).exists():
                self._search(LOP, searched)
            searches.append(read_json(file))
        write_json(run.search_file, {**searches[0], "targets": [target for s in searches for target in s["targets"]]})
        return self._answered(PREDICTOR, run, ratio)

    def _answered(self, name: str, run: Run, ratio: float) -> Chosen:
        """By the predictor that learns from a run's search."""
        train_stage(run, Local(), progress=False)
        # What was held out of training it is not to know either.
        held_out = read_json(run.folder / "predictors.json")["validation_targets"]
        start, predictor = time.perf_counter(), open_predictor(run, run.predictor_folder)
        known = [found for found in predictor.known if run.space.ratio_of(found.widths) not in held_out]
        allocation = replace(predictor, known=tuple(known)).allocate(run.space.budget(ratio))
        seconds = time.perf_counter() - start
        return Chosen(name, ratio, allocation.widths, run.config.importance, 0, seconds)

    def _read(self, name: str, ratio: float) -> Chosen:
        """What a method reads off the statistics."""
        method, run = METHODS[name], self.run
        survey_stage(run, Local(), [name])
        given = Given(run.space, run.config.importance, statistics_for(run, method))
        choice = method(given, run.space.budget(ratio))
        return Chosen(name, ratio, choice.allocation.widths, choice.importance, 0, choice.seconds)

    def _rival(self, name: str, ratio: float, tokens: int, importance: str | None = None) -> Chosen:
        """What a method finds with as many reward tokens, over neurons in an order that is its own if none is given."""
        run, workshop = self.run, self.workshop
        search, importance = METHODS[name].search, importance or METHODS[name].importance or run.config.importance
        assert search
        samples = run.samples.reward
        shuffled = [samples[index] for index in np.random.default_rng(self.seed).permutation(len(samples))]
        whole = self._tokens(shuffled)[0]
        settings = run.config.search
        # A scan of every layer alone on all samples would take more than all there is to spend: it has fewer of them.
        levels = {"sensitivity": settings.sensitivity_levels, PUZZLETRON: len(library(run.space))}.get(name)
        share = min(1.0, tokens / (run.space.layers * levels + 1) / whole) if levels else 1.0
        repair = self.repair(importance)
        evaluators = {
            part: Evaluator(
                workshop.elastic,
                workshop.encode(shuffled[: max(1, round(part * share * len(shuffled)))]),
                repair=repair,
                divergence=True,
                cache_bytes=run.config.cache_bytes,
            )
            for part in {1.0, *search.shares}
        }
        reward = Reward(
            evaluations=max(1, int(tokens / whole)),
            levels=settings.sensitivity_levels,
            options=settings.tree_options(),
            weights=workshop.elastic.weight_squares,
            reward=lambda evaluation: evaluation.worth("divergence"),
            tie_breaker=lambda evaluation: evaluation.log_probability,
            evaluate=lambda allocation, part: evaluators[part].evaluate(Candidate(allocation)),
            workers=lambda: InProcess(evaluators[1.0]),
            with_divergence=lambda: InProcess(evaluators[1.0]),
        )
        start = time.perf_counter()
        (found,) = search.run(run.space, reward, [run.space.budget(ratio)], self.seed)
        seconds = time.perf_counter() - start
        return Chosen(name, ratio, found.best.widths, importance, round(found.curve[-1][0] * share * whole), seconds)


def _reordered(made: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
    """The factor of the same sums with the neurons in another order.

    Args:
        made: [F, F], C (`lop.model.repair.factors`).
        move: [F], which of C's neurons comes first to last.
    """
    rows = made[move].double()
    return factor(rows @ rows.T, ridge=0.0)
