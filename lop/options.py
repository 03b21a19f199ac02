"""What the options of a command come to: its settings, its run and its target."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lop.errors import LopError
from lop.model.smol import NAME as SMOL
from lop.run.config import Config, config_for, find_config, load_config
from lop.space.latency import PHASES
from lop.space.memory import Load
from lop.space.size import Target, parse_count, parse_seconds
from lop.storage.places import check_lasting

# Torch is behind it, which help and refusals need not wait for.
if TYPE_CHECKING:
    from lop.run.run import Run


def settle(options: argparse.Namespace) -> tuple[Config, argparse.Namespace]:
    """The settings that a stage's command would run with, and its options for a process with another working directory.

    Raises:
        LopError: they are not valid, or what the stage writes would be lost.
    """
    with at_run(options):
        if "checkpoint" in options:  # It is all that the stage needs; there may be no run.
            check_distil(options)
            return config_of(options), options
        run = run_of(options)
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


def check_distil(options: argparse.Namespace) -> None:
    """Refuses what would be lost, and has the model default to what the checkpoint was pruned from.

    Raises:
        LopError: what the command writes would be lost, or the checkpoint does not say what it was pruned from.
    """
    from lop.checkpoint.export import source_of

    check_lasting("--out", options.out)
    check_lasting("--work", options.work)
    if not (options.model or options.config or options.run):
        options.model = source_of(options.checkpoint)


def config_of(options: argparse.Namespace) -> Config:
    """The named config, else the run's own, else the one made for the model.

    Raises:
        LopError: it is missing or not valid.
    """
    named_config = options.config or (demo_config(options.model) if options.is_demo else None)
    path = find_config(named_config) if named_config else config_for(options.model, folder=options.folder)
    seeds = getattr(options, "seeds", None)
    overrides = [*options.set, *([] if seeds is None else [f"tables.seeds={seeds}"])]
    named = {name: getattr(options, name, None) for name in ("model", "workers", "recovery", "max_width_ratio")}
    return load_config(path, overrides, **named)


def demo_config(model: str | None) -> str:
    """The name of the config that runs the whole path of a model in as little time as it can be shown in."""
    return "demo-smol" if model == SMOL else "demo"


def named_run(options: argparse.Namespace, config: Config) -> "Run | None":
    """The run that `--run` names, which `at_run` has made a local folder; None if it names none."""
    from lop.run.run import Run

    return Run(config, options.folder, options.origin) if options.folder else None


def run_of(options: argparse.Namespace, default: Path | None = None) -> "Run":
    """The named run, else the one in the default folder, or in the folder of the model.

    Raises:
        LopError: as `config_of`, or the folder would be lost.
    """
    config = config_of(options)
    from lop.run.run import Run

    if named := named_run(options, config):
        return named
    folder = default or Path("runs") / Path(config.model).name
    check_lasting("without --run, the folder", folder)
    return Run(config, folder)


def target_of(options: argparse.Namespace) -> Target:
    """What is asked for.

    Raises:
        LopError: it is no number, or options do not go together.
    """
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
