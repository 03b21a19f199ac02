"""LOP against every other way to choose widths, on `smol`, refit for everybody: `python benchmarks/smol.py`.

Each search and each score is a small file under `results/smol`, with the fingerprints of what it was made from. What is
missing is made, which takes hours on two cores; then the summary is printed from the files. `--check N` makes N of the
scores again, chosen at random, and says whether they agree. `--only search 0.3` makes one part, so that several
processes can share the work.

Every searching method may score as many reward tokens as LOP's search did at that target. All allocations are scored on
the same test items, drawn once by a fixed seed, with the refit that one factor a layer gives every width
(`lop.model.repair`), in the method's own order of neurons.

The last line is JSON: by method and ratio `kl` (nats, of the dense model's distributions from the pruned one's: summed
over a question's answer, mean over a passage's tokens, mean over items), `kl_of` images, knowledge and prose, and
`accuracy`; by ratio `lead` (of LOP's search over uniform, as a share of uniform's KL), its 95% `interval` (paired
bootstrap over images and texts) and `significant`: whether LOP is ahead of every other method by an interval that lies
above zero; `behind` names those where it is not.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import cell

from lop.methods.method import Given, Reward
from lop.methods.registry import METHODS
from lop.model.importance import importance, order
from lop.model.repair import Refits, factors, reordered
from lop.model.samples import Sample, fingerprint_samples
from lop.report.intervals import Interval, paired_bootstrap
from lop.run.building import Materials, Workshop
from lop.run.config import Config, find_config, load_config
from lop.run.run import Run
from lop.run.spectra import statistics_for
from lop.search.evaluator import Evaluator
from lop.search.loop import InProcess
from lop.search.racing import Candidate, pack_values, unpack_values
from lop.space.allocation import Allocation
from lop.stages.calibrate import calibrate_stage
from lop.stages.local import Local
from lop.stages.search import search_stage
from lop.storage.files import read_json
from lop.storage.fingerprint import fingerprint

RESULTS = Path(__file__).parent.parent / "results" / "smol"
RATIOS = (0.2, 0.3, 0.4, 0.5)
READ = ("uniform", "magnitude", "wanda", "flap", "owl", "alphapruning")
SEARCHING = ("random", "sensitivity", "evolution")
LOP = "lop-search"
ITEMS = 800
SETTINGS = (
    "search.evaluations=24",
    "search.simulations=48",
    "search.racing={}",
    "search.roots=[wanda, flap]",
    "search.sensitivity_levels=3",
    "workers=0",
)


@dataclass(frozen=True)
class Chosen:
    """What a method chose.

    Attributes:
        tokens: reward tokens that its search scored; 0 if it does not search.
    """

    method: str
    ratio: float
    widths: tuple[int, ...]
    importance: str
    tokens: int
    seconds: float


class Bench:
    """The model and what is measured with it, each made when it is first needed.

    Args:
        folder: of the runs of LOP's searches, which go on where they were stopped.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self.seed = seed
        self.run = Run(self.config(RATIOS[0]), folder / "calibration")
        calibrate_stage(self.run)

    def config(self, ratio: float) -> Config:
        """Of a search of one target."""
        target = f"search.targets={{first: {ratio}, last: {ratio}, step: 0.1}}"
        return load_config(find_config("smol"), [*SETTINGS, target, f"seed={self.seed}"])

    @cached_property
    def workshop(self) -> Workshop:
        """The model."""
        return Workshop(Materials.of(self.run))

    @cached_property
    def factors(self) -> list[torch.Tensor]:
        """Each layer's, in the order of the run's importance."""
        self.workshop.elastic.sort(self.run.order)
        return list(factors(self.workshop.elastic.backbone, self.workshop.encode(self.run.samples.calibration)))

    @cached_property
    def items(self) -> list[Sample]:
        """The test items that allocations are scored on."""
        test = self.run.samples.test
        chosen = np.random.default_rng(0).permutation(len(test))[:ITEMS]
        return [test[index] for index in sorted(chosen)]

    def repair(self, name: str) -> Refits:
        """Sorts the model by an importance, and gives what refits it in that order."""
        run, known = self.run, self.factors
        ranked = order(importance(name, run.statistics))
        self.workshop.elastic.sort(ranked)
        if name == run.config.importance:
            return Refits(known, cache_bytes=1 << 30)
        moves = (np.argsort(ours)[theirs] for ours, theirs in zip(run.order, ranked, strict=True))
        made = [reordered(c, torch.from_numpy(move)) for c, move in zip(known, moves, strict=True)]
        return Refits(made, cache_bytes=1 << 30)

    def search(self, ratio: float) -> Chosen:
        """LOP's own."""
        run = Run(self.config(ratio), self._folder / f"{self.seed}-{ratio}")
        run.folder.mkdir(parents=True, exist_ok=True)
        run.statistics_file.write_bytes(self.run.statistics_file.read_bytes())
        search_stage(run, Local(), progress=False)
        (found,) = read_json(run.search_file)["targets"]
        search, back = (self._tokens(part) for part in run.searched_samples)
        spent = sum(entry.get("scored", search[1]) / search[1] * search[0] for entry in found["evaluations"])
        spent += len(found["confirmed"]) * back[0]
        return Chosen(
            LOP, ratio, tuple(found["best"]["widths"]), run.config.importance, round(spent), run.seconds()["search"]
        )

    def _tokens(self, samples: Sequence[Sample]) -> tuple[int, int]:
        """Tokens and samples."""
        return sum(map(len, self.workshop.encode(samples).batches)), len(samples)

    def read(self, name: str, ratio: float) -> Chosen:
        """What a method reads off the statistics."""
        method, run = METHODS[name], self.run
        given = Given(run.space, run.config.importance, statistics_for(run, method))
        choice = method(given, run.space.budget(ratio))
        return Chosen(name, ratio, choice.allocation.widths, choice.importance, 0, choice.seconds)

    def rival(self, name: str, ratio: float, tokens: int) -> Chosen:
        """What a method finds with as many reward tokens."""
        run, workshop = self.run, self.workshop
        search = METHODS[name].search
        assert search
        samples = run.samples.reward
        shuffled = [samples[index] for index in np.random.default_rng(self.seed).permutation(len(samples))]
        # A scan of all layers on all samples alone would take more than all there is to spend: it has fewer of them.
        whole = self._tokens(shuffled)[0]
        settings = run.config.search
        scan = run.space.layers * settings.sensitivity_levels + 1
        share = min(1.0, tokens / scan / whole) if name == "sensitivity" else 1.0
        repair = self.repair(run.config.importance)
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
            reward=lambda evaluation: evaluation.worth("divergence"),
            tie_breaker=lambda evaluation: evaluation.log_probability,
            evaluate=lambda allocation, part: evaluators[part].evaluate(Candidate(allocation)),
            workers=lambda: InProcess(evaluators[1.0]),
            with_divergence=lambda: InProcess(evaluators[1.0]),
        )
        start = time.perf_counter()
        (found,) = search.run(run.space, reward, [run.space.budget(ratio)], self.seed)
        seconds = time.perf_counter() - start
        spent = round(scan * share * whole if name == "sensitivity" else found.curve[-1][0] * whole)
        return Chosen(name, ratio, found.best.widths, run.config.importance, spent, seconds)

    def score(self, chosen: Chosen) -> dict[str, Any]:
        """What an allocation says to the test items."""
        evaluator = Evaluator(
            self.workshop.elastic,
            self.workshop.encode(self.items),
            repair=self.repair(chosen.importance),
            divergence=True,
        )
        found = evaluator.compared(Allocation(chosen.widths))
        return {"divergence": pack_values(found.divergence), "hits": pack_values(found.correct)}

    @cached_property
    def made_from(self) -> str:
        """What the cells depend on."""
        run = self.run
        return fingerprint([run.calibration_fingerprints, run.config.importance, fingerprint_samples(self.items)])


def choose(bench: Bench, method: str, ratio: float) -> Chosen:
    """A method's cell at a ratio."""

    def make() -> dict[str, Any]:
        if method in READ:
            return asdict(bench.read(method, ratio))
        if method == LOP:
            return asdict(bench.search(ratio))
        return asdict(bench.rival(method, ratio, choose(bench, LOP, ratio).tokens))

    found = cell(RESULTS / f"choice-{method}-{ratio}-{bench.seed}.json", bench.made_from, make)
    del found["made_from"]
    return Chosen(**{**found, "widths": tuple(found["widths"])})


def scored(bench: Bench, chosen: Chosen) -> dict[str, Any]:
    """An allocation's cell."""
    name = fingerprint([chosen.importance, chosen.widths])
    return cell(RESULTS / f"score-{name}.json", bench.made_from, lambda: bench.score(chosen))


def summary(bench: Bench, methods: Sequence[str], ratios: Sequence[float]) -> dict[str, Any]:
    """The last line."""
    images = np.unique([sample.keys[0] for sample in bench.items], return_inverse=True)[1]
    one = np.zeros(len(images), dtype=np.int64)

    def interval(values: np.ndarray) -> Interval:
        return paired_bootstrap(values, one, images)

    asked = np.array([not sample.is_prose for sample in bench.items])
    shown = np.array([bool(sample.image) for sample in bench.items])
    parts = {"images": shown, "knowledge": asked & ~shown, "prose": ~asked}
    kl: dict[tuple[str, float], np.ndarray] = {}
    lines: dict[str, Any] = {
        "benchmark": "smol",
        "seed": bench.seed,
        "items": len(images),
        "kl": {},
        "kl_of": {},
        "accuracy": {},
    }
    for method in methods:
        for ratio in ratios:
            chosen = choose(bench, method, ratio)
            found = scored(bench, chosen)
            kl[method, ratio] = unpack_values(found["divergence"])
            hits = unpack_values(found["hits"])[asked].mean()
            lines["kl"].setdefault(method, {})[str(ratio)] = float(kl[method, ratio].mean())
            lines["accuracy"].setdefault(method, {})[str(ratio)] = float(hits)
            shares = {part: float(kl[method, ratio][mine].mean()) for part, mine in parts.items()}
            lines["kl_of"].setdefault(method, {})[str(ratio)] = shares
            print(
                f"{method:<14} {ratio:.0%}  KL {kl[method, ratio].mean():.4f}  right {hits:.1%}  {chosen.tokens} tokens"
            )
    lines |= {"lead": {}, "interval": {}, "significant": {}, "behind": {}}
    for ratio in ratios if LOP in methods else ():
        differences = {m: interval(kl[m, ratio] - kl[LOP, ratio]) for m in methods if m != LOP}
        base = kl["uniform", ratio].mean()
        lead = differences["uniform"]
        lines["lead"][str(ratio)] = lead.value / base
        lines["interval"][str(ratio)] = [lead.low / base, lead.high / base]
        lines["behind"][str(ratio)] = [m for m, difference in differences.items() if difference.low <= 0]
        lines["significant"][str(ratio)] = not lines["behind"][str(ratio)]
    return lines


def check(bench: Bench, count: int) -> Iterator[bool]:
    """Makes scores again, chosen at random."""
    records = [read_json(path) for path in sorted(RESULTS.glob(f"choice-*-{bench.seed}.json"))]
    for index in np.random.default_rng().permutation(len(records))[:count]:
        chosen = choose(bench, records[index]["method"], records[index]["ratio"])
        known, again = (unpack_values(found["divergence"]) for found in (scored(bench, chosen), bench.score(chosen)))
        print(f"{chosen.method} at {chosen.ratio:.0%}: KL {known.mean():.4f}, again {again.mean():.4f}")
        yield bool(np.allclose(known, again, rtol=0.02, atol=0.02))


def main() -> None:
    """Makes what is missing, and prints."""
    parser = argparse.ArgumentParser(description="LOP against every other way to choose widths, on smol.")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--methods", nargs="+", default=[*READ, *SEARCHING, LOP], choices=[*READ, *SEARCHING, LOP])
    parser.add_argument("--only", choices=("search", "scores"), help="make this part alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=int, default=0, metavar="N", help="make N scores again")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/benchmark-smol"), help="where searches keep their ledgers"
    )
    options = parser.parse_args()
    bench = Bench(options.runs, options.seed)
    if options.check:
        agree = list(check(bench, options.check))
        print(json.dumps({"benchmark": "smol", "checked": len(agree), "agree": sum(agree)}))
        return
    if options.only == "search":
        for ratio in options.ratios:
            for method in options.methods:
                choose(bench, method, ratio)
        return
    print(json.dumps(summary(bench, options.methods, options.ratios)))


if __name__ == "__main__":
    main()
