"""How long the parts of a model take on this device: what `lop profile` measures."""

import logging
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch.nn import Linear, Module, Parameter
from tqdm import tqdm

from lop.errors import LopError
from lop.model.adapter import open_model
from lop.model.families.family import Family
from lop.model.sources import family_of
from lop.run.run import Run
from lop.space.allocation import ATTENTION, FFN, Allocation, Part, Space, dense, project
from lop.space.latency import PHASES, Profile, Times
from lop.storage.files import write_json

log = logging.getLogger(__name__)

# Widths to measure, as shares of the dense one; and none, where parts may go altogether.
_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
# Where models of mixed widths are measured, too, to see whether the sums of parts say what they take.
_CHECKED = (0.2, 0.3, 0.5)
_ROUNDS = 5
_STEPS = 8  # Tokens decoded in each round.
# Of a phase, the parts' seconds in one pass.
Parts = dict[str, float]


class Clock(Protocol):
    """Tells when a device gets where it is now told to go."""

    def mark(self) -> Any:
        """This moment."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two moments."""


class HostClock:
    """For a CPU, which has done what it was told when the call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """For a GPU, which is behind: moments are put into its queue."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


def profile_stage(run: Run, out: Path, *, context: int, clock: Clock | None = None) -> Profile:
    """Measures the run's model on the device of its config and writes the profile.

    Args:
        out: a file, which is replaced.
        context: tokens that are read for `prefill`, and that the cache then holds for `decode`.
        clock: by default the device's own, of real time.

    Raises:
        LopError: the model is missing or damaged, the device is not to be had, or the context is none.
        OSError: the file cannot be written.
    """
    if context < 1:
        raise LopError(f"context {context} is not a number of tokens from 1 up")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise LopError(f"--out {out} is not a file in a folder that is there")
    config, space = run.config, run.space
    torch.set_num_threads(config.threads)
    network = open_model(run.model_folder, device=config.device, dtype=config.dtype)
    profile = profiled(network, family_of(run.model_folder), space, context, run.model_fingerprint, clock=clock)
    write_json(out, profile.as_dict())
    for phase, rows in profile.checks.items():
        for ratio, measured, predicted in (row.values() for row in rows):
            error = 100 * (predicted / measured - 1)
            log.info("%s at %.0f%%: %.3f ms a token, predicted %+.1f%%", phase, 100 * ratio, 1000 * measured, error)
    return profile


def profiled(
    network: Any, family: Family, space: Space, context: int, fingerprint: str, *, clock: Clock | None = None
) -> Profile:
    """The profile of a dense model that is loaded, on the device where it is.

    Args:
        context: as `profile_stage`.
        fingerprint: of the model.
        clock: as `profile_stage`.
    """
    on_gpu = network.device.type == "cuda"
    phases, checks = measure(network, family, space, context, clock=clock or (CudaClock() if on_gpu else HostClock()))
    return Profile(
        model=fingerprint,
        layers=space.layers,
        neurons=space.neurons,
        device=torch.cuda.get_device_name(network.device) if on_gpu else _cpu(),
        settings={
            "context": context,
            "dtype": str(network.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        phases=phases,
        checks=checks,
    )


def measure(
    network: Any, family: Family, space: Space, context: int, *, clock: Clock
) -> tuple[dict[str, Times], dict[str, list[dict[str, float]]]]:
    """Times of the phases by their parts, and how well their sums say what a model of mixed widths takes.

    One part at a time is cut, alike in all layers. Rounds go through all widths, so that a device that slows down does
    so for all of them; medians count. To look at parts takes time itself, on a GPU that waits for what it is told a
    third of all: what the dense model takes unwatched says how much, and models of mixed widths are not watched.

    Args:
        network: the dense model; it is as it was afterwards.
    """
    even = {part.name: _even(space, part) for part in space.parts}
    mixed = {
        ratio: project(np.tile(np.linspace(0, 2 * ratio, space.layers), len(space.parts)), space, space.budget(ratio))
        for ratio in _CHECKED
        if ratio <= space.max_target
    }
    watched = list(dict.fromkeys(model for of_part in even.values() for model in of_part))
    found: dict[tuple[str, Allocation], list[Parts]] = defaultdict(list)
    alone: dict[tuple[str, Allocation], list[float]] = defaultdict(list)
    # The first is for everything to get warm.
    with torch.inference_mode(), _resizable(network, family) as resize:
        for lap in tqdm(range(_ROUNDS + 1), desc="profile"):
            for model in watched:
                resize(model.widths)
                for phase, parts in _passes(network, context, _Stopwatch(network, family, clock)):
                    if lap:
                        found[phase, model].append(parts)
            for model in (dense(space), *mixed.values()):
                resize(model.widths)
                for phase, parts in _passes(network, context, _Whole(clock)):
                    if lap:
                        alone[phase, model].append(parts["whole"])
    whole = {key: statistics.median(seconds) for key, seconds in alone.items()}
    phases = {phase: _times(phase, found, whole[phase, dense(space)], even, space) for phase in PHASES}
    checks = {
        phase: [
            {
                "ratio": ratio,
                "measured": whole[phase, model],
                "predicted": phases[phase].of(*space.by_part(model.widths)),
            }
            for ratio, model in mixed.items()
        ]
        for phase in PHASES
    }
    return phases, checks


def _even(space: Space, part: Part) -> list[Allocation]:
    """Models of which one part is cut alike in all layers, the least first."""
    least = [0] if space.vanishing else []
    widths = sorted({max(part.min_width, round(share * part.width / part.step) * part.step) for share in _SHARES})
    whole = dense(space).widths
    start = space.layers * space.parts.index(part)
    cut = ((width,) * space.layers for width in dict.fromkeys([*least, *widths]))
    return [Allocation(whole[:start] + one + whole[start + space.layers :]) for one in cut]


def _times(
    phase: str,
    found: dict[tuple[str, Allocation], list[Parts]],
    alone: float,
    even: dict[str, list[Allocation]],
    space: Space,
) -> Times:
    """A phase's times.

    Args:
        alone: seconds of the dense model when nobody looks at its parts.
    """
    watched = statistics.median(sum(parts.values()) for parts in found[phase, dense(space)])
    # Of each look: at every layer's attention and FFN, and at the head.
    cost = max(0.0, watched - alone) / (2 * space.layers + 1)

    def median(name: str, *of: Allocation, looks: int = 0) -> float:
        seconds = statistics.median(parts[name] for model in of for parts in found[phase, model])
        return max(0.0, seconds - looks * cost)

    def by_width(name: str) -> dict[int, float]:
        start = space.layers * [part.name for part in space.parts].index(name)
        seconds = [median(name, model, looks=space.layers) / space.layers for model in even[name]]
        # A wider one that was faster by chance is not: a larger target may not get less.
        grown = (float(most) for most in np.maximum.accumulate(seconds))
        return dict(zip((model.widths[start] for model in even[name]), grown))

    every = [model for of_part in even.values() for model in of_part]
    ffn, groups = by_width(FFN), by_width(ATTENTION) if space.attention else {}
    return Times(
        attention=(
            list(groups.values())[-1] if groups else median(ATTENTION, *every, looks=space.layers) / space.layers
        ),
        head=median("head", *every, looks=1),
        other=median("other", *every),
        widths=tuple(ffn),
        ffn=tuple(ffn.values()),
        groups=tuple(groups),
        of_groups=tuple(groups.values()),
    )


def _passes(network: Any, context: int, watch: "Watch") -> Iterator[tuple[str, Parts]]:
    """One prefill and some steps of decoding, each with the seconds a token of its parts."""
    vocabulary = network.config.get_text_config().vocab_size
    ids = torch.arange(context, device=network.device)[None] % (vocabulary // 2)
    with watch.measured(tokens=context) as parts:
        answer = network(input_ids=ids, use_cache=True, logits_to_keep=1)
    yield "prefill", parts
    # transformers has renamed it.
    name = "cache" if hasattr(answer, "cache") else "past_key_values"
    cache = {name: getattr(answer, name), "use_cache": True}
    for _ in range(_STEPS):
        with watch.measured(tokens=1) as parts:
            network(input_ids=ids[:, :1], **cache)
        yield "decode", parts


class Watch(Protocol):
    """Takes the time of what runs inside a block."""

    def measured(self, *, tokens: int) -> AbstractContextManager[Parts]:
        """Fills what it yields with the seconds of one of `tokens`, once the block has ended."""


def _idle(clock: Clock) -> Any:
    """The moment at which a device has done all that it was told.

    A GPU that is still at something, such as the copies of `_resizable`, would hide how long it takes to tell it more.
    """
    now = clock.mark()
    clock.seconds(now, now)
    return clock.mark()


class _Whole:
    """Times a pass, and nothing in it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    @contextmanager
    def measured(self, *, tokens: int) -> Iterator[Parts]:
        """Fills what it yields with `whole`, the seconds of one of `tokens`, once the block has ended."""
        parts: Parts = {}
        start = _idle(self._clock)
        yield parts
        parts["whole"] = self._clock.seconds(start, self._clock.mark()) / tokens


class _Stopwatch:
    """Times layers, FFNs and head of a network inside the block."""

    def __init__(self, network: Any, family: Family, clock: Clock) -> None:
        layers = network.get_submodule(family.backbone).layers
        self._modules: list[tuple[str, Module]] = [("layers", layer) for layer in layers]
        self._modules += [("ffn", layer.get_submodule(family.ffn)) for layer in layers]
        self._modules.append(("head", network.get_submodule(family.head)))
        self._clock = clock
        self._started: dict[Module, Any] = {}
        self._spans: list[tuple[str, Any, Any]] = []

    def _watch(self, name: str, module: Module) -> Iterator[Any]:
        def start(module: Module, _: object) -> None:
            self._started[module] = self._clock.mark()

        def stop(module: Module, _: object, __: object) -> None:
            self._spans.append((name, self._started[module], self._clock.mark()))

        yield module.register_forward_pre_hook(start)
        yield module.register_forward_hook(stop)

    @contextmanager
    def measured(self, *, tokens: int) -> Iterator[Parts]:
        """Fills what it yields with the seconds of one of `tokens`, once the block has ended."""
        parts: Parts = {}
        self._spans.clear()
        hooks = [hook for name, module in self._modules for hook in self._watch(name, module)]
        try:
            start = _idle(self._clock)
            yield parts
            whole = self._clock.seconds(start, self._clock.mark())
        finally:
            for hook in hooks:
                hook.remove()
        sums = dict.fromkeys(("layers", "ffn", "head"), 0.0)
        for name, begin, end in self._spans:
            sums[name] += self._clock.seconds(begin, end)
        parts["attention"] = (sums["layers"] - sums["ffn"]) / tokens
        parts["ffn"] = sums["ffn"] / tokens
        parts["head"] = sums["head"] / tokens
        parts["other"] = (whole - sums["layers"] - sums["head"]) / tokens


@contextmanager
def _resizable(network: Any, family: Family) -> Iterator[Any]:
    """A function that gives the layers' parts other widths; they are whole again after the block."""
    layers = network.get_submodule(family.backbone).layers
    ffns, attentions = ([getattr(layer, name) for layer in layers] for name in (family.ffn, family.attention))
    linears = [part for whole in (*ffns, *attentions) for part in whole.children() if isinstance(part, Linear)]
    before = [(linear.weight, linear.bias) for linear in linears]

    def restore() -> None:
        for linear, (weight, bias) in zip(linears, before):
            linear.weight, linear.bias = weight, bias
        for layer, attention in zip(layers, attentions):
            setattr(layer, family.attention, attention)

    def resize(widths: Sequence[int]) -> None:
        restore()
        for ffn, width in zip(ffns, widths):
            # Rows are together as they are; columns are put together, as in a checkpoint.
            weights = {"gate_proj": ffn.gate_proj.weight[:width], "up_proj": ffn.up_proj.weight[:width]}
            weights["down_proj"] = ffn.down_proj.weight[:, :width].contiguous()
            for name, weight in weights.items():
                getattr(ffn, name).weight = Parameter(weight, requires_grad=False)
        for layer, groups in zip(layers, widths[len(layers) :]):
            family.keep_groups(layer, groups)

    try:
        yield resize
    finally:
        restore()


def _cpu() -> str:
    """This machine's processor, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
