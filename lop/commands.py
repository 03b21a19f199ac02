"""What each command does: reads its options, calls one function of the library, prints."""

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lop.checkpoint.bits import BITS
from lop.checkpoint.recoveries import UNTRAINED
from lop.errors import LopError
from lop.model.find import find_model
from lop.options import check_distil, config_of, demo_config, named_run, run_of, target_of
from lop.run.config import Config
from lop.storage.places import check_lasting

# Commands import what they run, torch with it: help and refusals need not wait for that.
if TYPE_CHECKING:
    from lop.run.choice import Choice
    from lop.run.compute import Compute

log = logging.getLogger(__name__)
# What the progress of each step is counted in.
_UNITS = {"recover": "layer", "quantise": "matrix", "teacher": "token", "distil": "step", "export": "B"}


def calibrate(options: argparse.Namespace) -> None:
    from lop.stages.calibrate import calibrate_stage, features_stage

    run = run_of(options)
    calibrate_stage(run)
    features_stage(run)
    print(run.location / run.statistics_file.name)


def check_trainable(options: argparse.Namespace) -> None:
    """Refuses at once what could be searched for hours, and then not be learnt from."""
    from lop.predictor.training import check_targets

    check_targets(config_of(options).search.targets.ratios)


def search(options: argparse.Namespace) -> None:
    from lop.stages.search import search_stage

    run = run_of(options)
    search_stage(run, _compute(run.config))
    print(run.location / run.search_file.name)


def train(options: argparse.Namespace) -> None:
    from lop.stages.train import train_stage

    run = run_of(options)
    train_stage(run, _compute(run.config))
    print(run.location / run.predictor_folder.name)


def predict(options: argparse.Namespace) -> None:
    from lop.run.choice import choose

    config, target = config_of(options), target_of(options)
    choice = choose(named_run(options, config), config, target, options.format, bits=options.bits)
    _tell_choice(choice, options)
    found = choice.describe()
    if options.json:
        print(json.dumps(found))
        return
    bits = f", {found['bits']} bits" if found["bits"] != BITS[0] else ""
    if choice.source is not None:
        print(f"source: {choice.source}")
    print(f"{found['parameters']:,} parameters, {found['bytes']:,} bytes, ratio {found['ratio']:.4f}{bits}")
    if "memory" in found:
        print(f"{found['memory']:,} bytes of memory at most while it answers")
    if target.profile is not None:
        print(f"{1000 * found['latency']:.3f} ms a token in {target.phase} on {target.profile.device}")
    groups = [f"  {kept} groups of heads" for kept in found.get("groups", ())] or [""] * len(found["widths"])
    for layer, (ratio, width, kept) in enumerate(zip(found["ratios"], found["widths"], groups)):
        print(f"layer {layer:>2}  {width:>6}  {'█' * round(40 * (1 - ratio)):<40}  {ratio:.1%} pruned{kept}")


def prune(options: argparse.Namespace) -> None:
    from lop.stages.prune import prune_stage

    check_lasting("--out", options.out)
    config = config_of(options)
    run = named_run(options, config)
    with _bars() as progress:
        manifest = prune_stage(
            run,
            config,
            target_of(options),
            options.out,
            format=options.format,
            bits=options.bits,
            vision=options.vision,
            on_choice=partial(_tell_choice, options=options),
            progress=progress,
        )
    if manifest["padding_bytes"]:
        log.info("padding: %s bytes of zeros", f"{manifest['padding_bytes']:,}")
    print(options.out)


def reshape(options: argparse.Namespace) -> None:
    from lop.stages.reshape import reshape_stage

    check_lasting("--out", options.out)
    reshape_stage(config_of(options), options.method, options.target, options.out)
    print(options.out)


def probe(options: argparse.Namespace) -> None:
    from lop.run.probes import probes_file
    from lop.stages.probe import probe_stage

    run = run_of(options)
    probe_stage(run, _compute(run.config), options.budget, options.target)
    print(run.location / probes_file(run).name)


def measure(options: argparse.Namespace) -> None:
    from lop.console import PlainConsole
    from lop.report.qualities import plot_qualities, qualities_table
    from lop.stages.measure import measure_stage

    run = run_of(options)
    qualities = measure_stage(run, _compute(run.config))
    plot_qualities(qualities, run.folder / "qualities.png")
    PlainConsole().print(qualities_table(qualities))
    print(run.location / run.qualities_file.name)


def quantise(options: argparse.Namespace) -> None:
    from lop.checkpoint.quantise import quantise

    check_lasting("--out", options.out)
    folder = find_model(options.model)
    with _bars() as progress:
        quantise(folder, options.out, options.bits, name=options.model, vision=options.vision, progress=progress)
    print(options.out)


def profile(options: argparse.Namespace) -> None:
    from lop.stages.profile import profile_stage

    profile_stage(run_of(options), options.out, context=options.context)
    print(options.out)


def distil(options: argparse.Namespace) -> None:
    check_distil(options)
    config = config_of(options)
    from lop.stages.distil import distil_stage

    with _bars() as progress:
        distil_stage(
            config,
            options.checkpoint,
            options.out,
            texts=options.text,
            folders=options.samples,
            work=options.work,
            progress=progress,
        )
    from accelerate import PartialState

    if PartialState().is_main_process:  # Of several (`accelerate launch`) one speaks for all.
        print(options.out)


def convert(options: argparse.Namespace) -> None:
    from lop.verbs import convert

    check_lasting("--out", options.out)
    with _bars() as progress:
        convert(options.checkpoint, options.out, format=options.format, progress=progress)
    print(options.out)


def inspect(options: argparse.Namespace) -> None:
    from lop.checkpoint.inspection import inspect, print_inspection

    found = inspect(find_model(options.model))
    if options.json:
        print(json.dumps(found.as_dict()))
    else:
        print_inspection(found)
    if found.damage:
        raise LopError(found.damage)


def compare(options: argparse.Namespace) -> None:
    from lop.model.find import find_model
    from lop.stages.compare import compare_stage, tables_stage

    run = run_of(options)
    compute = _compute(run.config)
    for name in options.against:
        find_model(name)  # Before anything is done for nothing.
    print(compare_stage(run, compute))
    if (tables := tables_stage(run, compute, others=options.against)) is not None:
        print(tables)


def rivals(options: argparse.Namespace) -> None:
    from lop.stages.rivals import rivals_stage

    run = run_of(options)
    for outcome in rivals_stage(run, _compute(run.config), seeds=run.config.tables.seeds):
        print(f"{outcome.rival:<14} {outcome.target:>6.1%}  seed {outcome.seed}  reward {outcome.reward:.4f}")


def evaluate(options: argparse.Namespace) -> None:
    from lop.plugins.evaluate import Evaluate, evaluate

    data = {}
    for entry in options.data:
        task, equals, folder = entry.partition("=")
        if not equals or not Path(folder).is_dir():
            raise LopError(f"--data {entry!r}: write TASK=FOLDER with a folder that is there")
        data[task] = Path(folder)
    if options.batch_size < 1 or (options.limit is not None and options.limit < 1):
        raise LopError(f"--batch-size {options.batch_size} and --limit {options.limit} must be at least 1")
    settings = Evaluate(options.batch_size, options.device, options.dtype, options.limit, data, options.cache)
    results = evaluate(options.model, options.tasks.split(","), settings)
    if options.json:
        print(json.dumps(results))
        return
    for task, metrics in results.items():
        for metric, value in metrics.items():
            print(f"{task:<16} {metric:<12} {value:.4f}")


def demo(options: argparse.Namespace) -> None:
    from lop.stages.demo import demo

    run = run_of(options, Path("runs") / demo_config(options.model))
    print(demo(run, _compute(run.config)))


def ledger(options: argparse.Namespace) -> None:
    from lop.search.watch import print_ledger
    from lop.storage.location import Location

    print_ledger(Location.parse(options.place), as_json=options.json)


def watch(options: argparse.Namespace) -> None:
    from lop.search.watch import watch
    from lop.storage.location import Location

    watch(Location.parse(options.place), once=options.once)


def serve(options: argparse.Namespace) -> None:
    from ray_jobs.cluster import connected
    from serve.app import app
    from serve.launch import check_address, launch, service_settings

    settings = service_settings(options.runs, options.set, storage=options.storage, keys_file=options.keys)
    check_address(settings, options.host, options.port)
    application = app(settings)  # What is wrong with a model or the storage is told before anything is started.
    with connected():
        launch(application, host=options.host, port=options.port)


def _compute(config: Config) -> "Compute":
    """Where stages compute: in this process, or on Ray's actors."""
    if config.workers == 0:
        from lop.stages.local import Local

        return Local()
    from ray_jobs.compute import OnRay

    return OnRay()


def _tell_choice(choice: "Choice", options: argparse.Namespace) -> None:
    """Says what each number of bits would give, or how to have that weighed."""
    for option in choice.options:
        log.info("%s%s", option, " (chosen)" if option.bits == choice.bits else "")
    is_open = options.bytes is not None and options.bits is None and options.format == "hf"
    if is_open and not choice.options and choice.footprint.recovery in UNTRAINED:
        log.info("%d bits: `lop measure` once, and --bytes chooses the best of ratio and bits", choice.bits)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A callback that shows each step as a progress bar of its own."""
    bars: dict[str, tqdm[Any]] = {}

    def update(step: str, done: int, total: int) -> None:
        if step not in bars:
            scale = step in ("export", "teacher")
            bars[step] = tqdm(total=total, desc=step, unit=_UNITS[step], unit_scale=scale)
        bars[step].update(done - bars[step].n)

    try:
        yield update
    finally:
        for bar in bars.values():
            bar.close()
