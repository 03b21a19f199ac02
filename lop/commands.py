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
from lop.model.smol import NAME as SMOL
from lop.run.config import Config, config_for, find_config, load_config
from lop.space.latency import PHASES
from lop.space.memory import Load
from lop.space.size import Target, parse_count, parse_seconds
from lop.storage.places import check_lasting

# Commands import what they run, torch with it: help and refusals need not wait for that.
if TYPE_CHECKING:
    from lop.run.choice import Choice
    from lop.run.compute import Compute
    from lop.run.run import Run

log = logging.getLogger(__name__)
# What the progress of each step is counted in.
_UNITS = {"recover": "layer", "quantise": "matrix", "teacher": "token", "distil": "step", "export": "B"}


def settle(options: argparse.Namespace) -> tuple[Config, argparse.Namespace]:
    """The settings that a stage's command would run with, and its options for a process with another working directory.

    Raises:
        LopError: they are not valid, or what the stage writes would be lost.
    """
    with at_run(options):
        if "checkpoint" in options:  # It is all that the stage needs; there may be no run.
            _check_distil(options)
            return _config(options), options
        run = _run(options)
        return run.config, argparse.Namespace(**{**vars(options), "run": run.location.uri})


@contextmanager
def at_run(options: argparse.Namespace) -> Iterator[None]:
    """Makes the run that `--run` names a local folder inside the block."""
    options.folder, options.origin = None, None
    if not getattr(options, "run", None):
        yield
        return
    from lop.storage.mirror import local_run

    check_lasting("--run", options.run)
    with local_run(options.run) as (options.folder, options.origin):
        yield


def calibrate(options: argparse.Namespace) -> None:
    from lop.stages.calibrate import calibrate_stage, features_stage

    run = _run(options)
    calibrate_stage(run)
    features_stage(run)
    print(run.location / run.statistics_file.name)


def search(options: argparse.Namespace) -> None:
    from lop.stages.search import search_stage

    run = _run(options)
    search_stage(run, _compute(run.config))
    print(run.location / run.search_file.name)


def train(options: argparse.Namespace) -> None:
    from lop.stages.train import train_stage

    run = _run(options)
    train_stage(run, _compute(run.config))
    print(run.location / run.predictor_folder.name)


def predict(options: argparse.Namespace) -> None:
    from lop.run.choice import choose

    config, target = _config(options), _target(options)
    choice = choose(_named_run(options, config), config, target, options.format, bits=options.bits)
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
    config = _config(options)
    run = _named_run(options, config)
    with _bars() as progress:
        manifest = prune_stage(
            run,
            config,
            _target(options),
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
    reshape_stage(_config(options), options.method, options.target, options.out)
    print(options.out)


def probe(options: argparse.Namespace) -> None:
    from lop.run.probes import probes_file
    from lop.stages.probe import probe_stage

    run = _run(options)
    probe_stage(run, _compute(run.config), options.budget, options.target)
    print(run.location / probes_file(run).name)


def measure(options: argparse.Namespace) -> None:
    from lop.console import PlainConsole
    from lop.report.qualities import plot_qualities, qualities_table
    from lop.stages.measure import measure_stage

    run = _run(options)
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

    profile_stage(_run(options), options.out, context=options.context)
    print(options.out)


def distil(options: argparse.Namespace) -> None:
    _check_distil(options)
    config = _config(options)
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

    run = _run(options)
    compute = _compute(run.config)
    for name in options.against:
        find_model(name)  # Before anything is done for nothing.
    print(compare_stage(run, compute))
    if (tables := tables_stage(run, compute, others=options.against)) is not None:
        print(tables)


def rivals(options: argparse.Namespace) -> None:
    from lop.stages.rivals import rivals_stage

    run = _run(options)
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

    run = _run(options, Path("runs") / _demo_config(options.model))
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


def _check_distil(options: argparse.Namespace) -> None:
    """Has the model default to what the checkpoint was pruned from."""
    from lop.checkpoint.export import source_of

    check_lasting("--out", options.out)
    check_lasting("--work", options.work)
    if not (options.model or options.config or options.run):
        options.model = source_of(options.checkpoint)


def _config(options: argparse.Namespace) -> Config:
    """The named config, else the run's own, else the one made for the model."""
    named_config = options.config or (_demo_config(options.model) if options.is_demo else None)
    path = find_config(named_config) if named_config else config_for(options.model, folder=options.folder)
    seeds = getattr(options, "seeds", None)
    overrides = [*options.set, *([] if seeds is None else [f"tables.seeds={seeds}"])]
    named = {name: getattr(options, name, None) for name in ("model", "workers", "recovery", "max_width_ratio")}
    return load_config(path, overrides, **named)


def _demo_config(model: str | None) -> str:
    """The name of the config that runs the whole path of a model in as little time as it can be shown in."""
    return "demo-smol" if model == SMOL else "demo"


def _named_run(options: argparse.Namespace, config: Config) -> "Run | None":
    from lop.run.run import Run

    return Run(config, options.folder, options.origin) if options.folder else None


def _run(options: argparse.Namespace, default: Path | None = None) -> "Run":
    config = _config(options)
    from lop.run.run import Run

    if named := _named_run(options, config):
        return named
    folder = default or Path("runs") / Path(config.model).name
    check_lasting("without --run, the folder", folder)
    return Run(config, folder)


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


def _target(options: argparse.Namespace) -> Target:
    load, profile = _load(options), None
    if options.device_profile:
        from lop.run.prediction import read_profile

        profile = read_profile(options.device_profile)
    if options.latency_of and options.latency is None:
        raise LopError("--latency-of is for --latency")
    # A target refuses what does not belong to it.
    target = partial(Target, load=load, profile=profile, phase=options.latency_of or PHASES[0])
    if options.parameters is not None:
        return target(parameters=parse_count(options.parameters, what="parameters"))
    if options.bytes is not None:
        return target(bytes=parse_count(options.bytes, what="bytes"))
    if options.memory is not None:
        return target(memory=parse_count(options.memory, what="bytes"))
    if options.latency is not None:
        return target(latency=parse_seconds(options.latency))
    try:
        ratio = float(options.target)
    except ValueError:
        raise LopError(f"target {options.target!r} is not a number such as 0.3") from None
    return target(ratio=ratio)


def _load(options: argparse.Namespace) -> Load | None:
    """What `--memory` is to suffice for."""
    pixels = options.image_pixels and parse_count(options.image_pixels, what="pixels")
    given = {"images": options.images, "batch": options.batch, "pixels": pixels}
    given = {name: value for name, value in given.items() if value is not None}
    if options.context is not None:
        return Load(options.context, **given)
    if given:
        raise LopError("--images, --batch and --image-pixels go with --memory and its --context")
    return None


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
