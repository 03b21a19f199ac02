"""What a person asks of LOP in Python, as on the command line: `predict`, `prune`, `convert` and `inspect` of `lop`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lop.checkpoint.formats import Format
from lop.checkpoint.recoveries import Recovery
from lop.model.find import find_model
from lop.run.choice import answer
from lop.run.config import Config, config_for, load_config
from lop.run.prediction import read_profile
from lop.run.run import Run
from lop.space.memory import Load
from lop.space.size import Target, parse_count, parse_seconds
from lop.storage.mirror import local_run

# With torch behind them: a prediction needs none.
if TYPE_CHECKING:
    from lop.checkpoint.inspection import Inspection


def predict(
    model: str | None = None,
    *,
    ratio: float | None = None,
    parameters: int | str | None = None,
    bytes: int | str | None = None,
    memory: int | str | None = None,
    context: int | None = None,
    images: int = 0,
    batch: int = 1,
    image_pixels: int = 2**20,
    latency: float | str | None = None,
    device_profile: str | Path | None = None,
    latency_of: str = "decode",
    run: str | Path | None = None,
    format: Format = "hf",
    recovery: Recovery | None = None,
    max_width_ratio: float | None = None,
    bits: int | None = None,
) -> dict[str, Any]:
    """The allocation for a target, as `lop predict --json` prints it: `lop.predict("tiny", ratio=0.3)["widths"]`.

    Args:
        model: a shipped model's name, a local checkpoint or a hub id; by default the run's own, or `tiny`.
        ratio, parameters, bytes, memory, latency: exactly one of them. The share of FFN neurons to remove; or at most
            so many of the whole checkpoint, as numbers or as `"5B"` and `"8GiB"`; or held at most while it answers;
            or at most so long a token, in seconds or as `"40ms"`.
        context, images, batch, image_pixels: with `memory`, what it must suffice for: tokens of a sequence, images in
            it and the pixels of each, sequences at once.
        device_profile, latency_of: with `latency`, what `lop profile` has measured; of `decode` or `prefill`.
        run: the folder or URI of the run whose predictor answers; by default what ships for the model.
        format, recovery: of the checkpoint that is meant; None takes the config's recovery.
        max_width_ratio: no layer wider than so many times the mean width.
        bits: 16, 8 or 4, of the weights; None is 16, or with `bytes` the best that `lop measure` knows of.

    Returns:
        `ratio`, `ratios` and `widths` of the layers' FFNs, `kept_neurons`, `parameters`, `bytes`, `bits`; `groups` of
        their attention where it is open, and `memory` or `latency` if asked for.

    Raises:
        LopError: the target cannot be met, or the predictor is missing or of another model.
    """
    load = (context, images, batch, image_pixels)
    target = _target(ratio, parameters, bytes, memory, load, latency, device_profile, latency_of)
    named = {"model": model, "recovery": recovery, "max_width_ratio": max_width_ratio}
    return _with_run(run, named, lambda found, config: answer(found, config, target, format, bits))


def prune(
    model: str | None,
    out: str | Path,
    *,
    ratio: float | None = None,
    parameters: int | str | None = None,
    bytes: int | str | None = None,
    memory: int | str | None = None,
    context: int | None = None,
    images: int = 0,
    batch: int = 1,
    image_pixels: int = 2**20,
    latency: float | str | None = None,
    device_profile: str | Path | None = None,
    latency_of: str = "decode",
    run: str | Path | None = None,
    format: Format = "hf",
    recovery: Recovery | None = None,
    max_width_ratio: float | None = None,
    bits: int | None = None,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> dict[str, Any]:
    """Writes the pruned checkpoint for a target, as `lop prune` does: `lop.prune("tiny", "small", bytes="4MiB")`.

    Args:
        model: as in `predict`; None takes the run's own.
        out: a new folder, or a URI such as `s3://bucket/folder`; it appears whole or not at all.
        progress: called with the step (`"recover"`, `"quantise"` or `"export"`), how much of it is done, and how much
            it is in all.
        The others are those of `predict`.

    Returns:
        The checkpoint's manifest, as it stands in its `lop.json`.

    Raises:
        LopError: as for `predict`; or the format cannot hold what recovery adds, or `out` is there already.
        OSError: the disk is full or read-only; nothing is left behind.
    """
    from lop.stages.prune import prune_stage

    load = (context, images, batch, image_pixels)
    target = _target(ratio, parameters, bytes, memory, load, latency, device_profile, latency_of)
    named = {"model": model, "recovery": recovery, "max_width_ratio": max_width_ratio}
    return _with_run(
        run,
        named,
        lambda found, config: prune_stage(found, config, target, out, format=format, bits=bits, progress=progress),
    )


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    format: Format = "gguf",
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> dict[str, Any]:
    """Writes a checkpoint for llama.cpp, as `lop convert` does: `lop.convert("small", "small-gguf")`.

    Args:
        checkpoint: what `prune` wrote, or a dense model: a shipped one's name, a local folder or a hub id.
        out: as in `prune`.
        format: one of those that begin with `gguf`.
        progress: called with the step (`"export"`), how many bytes of it are done, and how many it is in all.

    Returns:
        The new folder's manifest.

    Raises:
        LopError: the checkpoint is damaged, llama.cpp cannot compute the model, or `out` is there already.
        OSError: the disk is full or read-only; nothing is left behind.
    """
    from lop.checkpoint.export import convert

    return convert(find_model(str(checkpoint)), out, format=format, progress=partial(progress, "export"))


def inspect(model: str | Path) -> "Inspection":
    """What a checkpoint is, dense or pruned, its files checked: `lop.inspect("small").widths`.

    Args:
        model: a shipped model's name, a local folder or a hub id.

    Raises:
        LopError: there is no such checkpoint, or its headers are damaged.
    """
    from lop.checkpoint.inspection import inspect

    return inspect(find_model(str(model)))


def _target(
    ratio: float | None,
    parameters: int | str | None,
    bytes: int | str | None,
    memory: int | str | None,
    load: tuple[int | None, int, int, int],
    latency: float | str | None,
    profile: str | Path | None,
    phase: str,
) -> Target:
    def count(value: int | str | None, what: str) -> int | None:
        return parse_count(value, what=what) if isinstance(value, str) else value

    context, *rest = load
    return Target(
        ratio=ratio,
        parameters=count(parameters, "parameters"),
        bytes=count(bytes, "bytes"),
        memory=count(memory, "bytes"),
        latency=parse_seconds(latency) if isinstance(latency, str) else latency,
        load=None if context is None else Load(context, *rest),
        profile=None if profile is None else read_profile(Path(profile)),
        phase=phase,
    )


def _with_run(
    place: str | Path | None, named: dict[str, Any], act: Callable[[Run | None, Config], dict[str, Any]]
) -> dict[str, Any]:
    """What `act` makes of a run, if one is named, and of the settings."""
    if place is None:
        return act(None, load_config(config_for(named["model"]), **named))
    with local_run(str(place)) as (folder, origin):
        config = load_config(config_for(named["model"], folder=folder), **named)
        return act(Run(config, folder, origin), config)
