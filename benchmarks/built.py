"""Models of true shapes with random weights, built on a device without a checkpoint, and what they take there.

What `benchmarks/targets.py --device cuda` measures: one process builds a model once and goes through its loads. `small`
tries the same on a CPU in a minute; its memory is then the process's, and says nothing.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
import transformers
from cells import cell
from photographs import PROCESSOR, SHAPES, hub_config

from lop.model.families.family import Family
from lop.model.shape import read_shape
from lop.model.sources import family_of
from lop.space.allocation import Space
from lop.space.memory import Load, Shape, working_bytes
from lop.stages.profile import profiled
from lop.storage.files import write_json
from lop.storage.fingerprint import fingerprint

_MEGAPIXEL = 1036 * 1036
_GRANULARITY, _MAX_RATIO = 128, 0.95
# Tokens that latency is measured with.
_CONTEXT = 1024
# Of what is predicted: how much larger a card may have to be, as the allocator does not use all that it takes.
_MARGINS = (0, 0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Case:
    """One measurement of memory.

    Attributes:
        kept: whether glibc may keep what is freed.
        share: of each FFN's neurons.
    """

    model: str
    load: Load
    share: float = 1.0
    kept: bool = False

    @property
    def name(self) -> str:
        """Of its cell."""
        load = self.load
        name = f"{self.model}-{load.context}-{load.images}x{load.pixels}-{load.batch}"
        return name + (f"-{self.share:g}" if self.share < 1 else "") + ("-kept" if self.kept else "")


# A model's wider cases come before its narrower ones: what is cut off is gone.
CASES = (
    Case("small", Load(512, 0, pixels=112 * 112)),
    Case("small", Load(512, 4, 2, pixels=112 * 112)),
    Case("small", Load(512, 4, pixels=112 * 112), share=0.5),
    *(Case("3b", Load(context, 0, pixels=_MEGAPIXEL)) for context in (1024, 4096, 8192)),
    Case("3b", Load(1536, 1, pixels=_MEGAPIXEL)),
    Case("3b", Load(4096, 1, pixels=_MEGAPIXEL)),
    Case("3b", Load(8192, 4, pixels=_MEGAPIXEL)),
    Case("3b", Load(1024, 0, 4, pixels=_MEGAPIXEL)),
    Case("3b", Load(4096, 1, 4, pixels=_MEGAPIXEL)),
    Case("3b", Load(8192, 4, 4, pixels=_MEGAPIXEL)),
    Case("3b", Load(8192, 0, pixels=_MEGAPIXEL), share=0.5),
    Case("3b", Load(8192, 4, pixels=_MEGAPIXEL), share=0.5),
    Case("3b", Load(8192, 0, 4, pixels=_MEGAPIXEL), share=0.125),
    Case("7b", Load(1024, 0, pixels=_MEGAPIXEL)),
    Case("7b", Load(8192, 4, pixels=_MEGAPIXEL)),
    Case("7b", Load(8192, 0, 4, pixels=_MEGAPIXEL)),
    Case("7b", Load(8192, 4, pixels=_MEGAPIXEL), share=0.5),
)


class Meter(Protocol):
    """Tells how much memory of a device is held."""

    name: str

    def start(self) -> None:
        """Gives back what nobody holds; peaks are counted from here."""

    def held(self) -> int:
        """Bytes that are held now, weights included."""

    def holes(self) -> int:
        """Bytes that the allocator has between what is held now."""

    def lap(self) -> dict[str, int]:
        """Bytes at the worst moment since the last lap: `allocated`, and what else the device says."""

    def context(self) -> int:
        """Bytes that are taken on the device, and that no tensor can have."""

    def limited(self, size: int) -> Any:
        """A block in which there are so many bytes of memory and no more."""


class Gpu:
    """A GPU, by torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        # Not all that is asked below takes a device without a number.
        self._device = torch.device("cuda", device.index or 0)
        self.name = torch.cuda.get_device_name(self._device)

    def start(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def held(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def holes(self) -> int:
        return torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)

    def lap(self) -> dict[str, int]:
        # `allocated` is `torch.cuda.max_memory_allocated()`: `requested`, rounded up; `reserved` is what was taken from
        # the GPU to give that out.
        stats = torch.cuda.memory_stats(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return {name: stats[f"{name}_bytes.all.peak"] for name in ("allocated", "requested", "reserved")}

    def context(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)

    @contextmanager
    def limited(self, size: int) -> Iterator[None]:
        total = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), self._device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)


class Host:
    """The memory of this process, to try the script: it has no limit, and what is freed may stay."""

    name = "cpu"

    def start(self) -> None:
        gc.collect()
        restart_peak()

    def held(self) -> int:
        return status("VmRSS")

    def holes(self) -> int:
        return 0

    def lap(self) -> dict[str, int]:
        peak = status("VmHWM")
        restart_peak()
        return {"allocated": peak}

    def context(self) -> int:
        return 0

    @contextmanager
    def limited(self, size: int) -> Iterator[None]:
        yield


def status(key: str) -> int:
    """Bytes that the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def restart_peak() -> None:
    """The kernel's high-water mark, VmHWM, starts again from here."""
    Path("/proc/self/clear_refs").write_text("5")


class Built:
    """A model of random bfloat16 weights on a device."""

    def __init__(self, model: str, device: torch.device) -> None:
        self._model, self._device = model, device
        with TemporaryDirectory() as parent:
            folder = Path(parent)
            write_json(folder / "config.json", hub_config(SHAPES[model]))
            write_json(folder / "preprocessor_config.json", PROCESSOR)
            self.shape: Shape = read_shape(folder, 2)
            self.family: Family = family_of(folder)
            self._config = transformers.Qwen2_5_VLConfig.from_pretrained(folder)
        sizes = SHAPES[model]
        self.space = Space(sizes["num_hidden_layers"], sizes["intermediate_size"], _GRANULARITY, _MAX_RATIO)

    @cached_property
    def network(self) -> Any:
        """Made when first asked for."""
        start = time.perf_counter()
        with torch.device(self._device):
            torch.manual_seed(0)
            network = transformers.Qwen2_5_VLForConditionalGeneration._from_config(self._config, dtype=torch.bfloat16)
        network.eval().requires_grad_(False)
        if network.config._attn_implementation != "sdpa":
            raise RuntimeError(f"attention is {network.config._attn_implementation}, and not sdpa")
        # What libraries keep is there after a first answer.
        answer(network, prompt(network, Load(64, 0), self.shape.tower.merge))
        print(f"{self._model}: built in {time.perf_counter() - start:.1f} s", flush=True)
        return network


def measure_built(
    models: Sequence[str], device: torch.device, results: Path, *, seconds: float, only: str | None, names: set[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """The cells of these models, those that are missing made: of memory, of latency, and what came to nothing.

    Latency is that of the last model alone: it takes as long as all of a model's loads.

    Args:
        seconds: after so many, nothing is begun any more.
        only: `memory` or `latency`; both if None.
        names: of cells, to make no others; empty for all.
    """
    end = time.perf_counter() + seconds
    meter: Meter = Gpu(device) if device.type == "cuda" else Host()
    versions = [meter.name, torch.__version__, transformers.__version__, "1"]
    memory, latency, missing = [], [], []

    def made(name: str, made_from: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        if time.perf_counter() > end:
            print(f"{name}: left out, {seconds:g} s are over", flush=True)
        else:
            try:
                return {"name": name, **cell(results / f"{name}.json", fingerprint([*made_from, *versions]), make)}
            except Exception as error:  # One that does not fit must not cost the others.
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
        missing.append(name)
        return None

    for model in models:
        built = Built(model, device)
        timed: list[Case | None] = [None] if model == models[-1] else []
        # Latency is that of the dense model, and so before the first narrower case.
        steps = sorted([*timed, *(case for case in CASES if case.model == model)], key=_order)
        for case in steps:
            kind = "memory" if case else "latency"
            name = f"{kind}-{device.type}-{case.name if case else model}"
            if only not in (None, kind) or (names and name not in names):
                continue
            if case is None:
                found = made(name, [model, _CONTEXT, "2"], lambda b=built: _latency(b, meter))  # type: ignore[misc]
                latency += [found] if found else []
                continue
            found = made(name, [asdict(case)], lambda b=built, c=case: _memory(b, c, meter))  # type: ignore[misc]
            if found:
                print(json.dumps(found), flush=True)
                memory.append(found)
        del built
        meter.start()
    return memory, latency, missing


def names_of(models: Sequence[str], device: torch.device) -> list[str]:
    """Of the cells that there are."""
    memory = [f"memory-{device.type}-{case.name}" for case in CASES if case.model in models]
    return [*memory, f"latency-{device.type}-{models[-1]}"]


def _order(case: Case | None) -> float:
    """The dense model's first, then latency, then ever narrower ones."""
    return -0.99 if case is None else -case.share


def _memory(built: Built, case: Case, meter: Meter) -> dict[str, Any]:
    """The peak of a run and of its phases, beside what is predicted, and the least card on which it runs."""
    network, load = built.network, case.load
    width = narrow(network, case.share * built.space.neurons)
    inputs = prompt(network, load, built.shape.tower.merge)
    weights = sum({each.data_ptr(): each.nbytes for each in network.parameters()}.values())
    predicted = weights + working_bytes(built.shape, load, width)
    meter.start()
    # Rounding up the weights, buffers, and what libraries work with.
    kept = meter.held() - weights - sum(each.nbytes for each in inputs.values())
    holes = meter.holes()
    phases: dict[str, dict[str, int]] = {}

    def ends(phase: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if phase not in phases:
                phases[phase] = meter.lap()

        return hook

    hooks = [
        network.get_submodule(built.family.tower).register_forward_hook(ends("seeing")),
        network.register_forward_hook(ends("reading")),
    ]
    try:
        start = time.perf_counter()
        answer(network, inputs)
        took = time.perf_counter() - start
        phases["answering"] = meter.lap()
    finally:
        for hook in hooks:
            hook.remove()
    most = {name: max(phase[name] for phase in phases.values()) for name in phases["answering"]}
    context = meter.context()
    return {
        "device": meter.name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "width": width,
        "weights": weights,
        "kept": kept,
        "holes": holes,
        "measured": most["allocated"],
        "predicted": predicted,
        **{name: size for name, size in most.items() if name != "allocated"},
        "context": context,
        "phases": {phase: found["allocated"] for phase, found in phases.items()},
        "seconds": took,
        "margin": _margin(lambda: answer(network, inputs), predicted, meter),
    }


def _margin(run: Callable[[], object], predicted: int, meter: Meter) -> float | None:
    """How much more than predicted the allocator needs for a run, as a share; None if that is beyond all tried."""
    for margin in _MARGINS:
        meter.start()
        try:
            with meter.limited(int(predicted * (1 + margin))):
                run()
            return margin
        except RuntimeError:  # torch's for memory is one; what libraries raise that get none is not always it.
            continue
    return None


def answer(network: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Two tokens, so that the second one is read with the cache of the first."""
    with torch.inference_mode():
        network.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    # A plain call would take this prompt's positions for its own.
    network.model.rope_deltas = None


def narrow(network: Any, width: float) -> int:
    """Leaves the first neurons of each FFN, for good; how many."""
    width = int(width)
    for layer in network.model.language_model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name)
            whole = linear.weight
            kept = whole[:, :width] if name == "down_proj" else whole[:width]
            if kept.shape != whole.shape:
                linear.weight = torch.nn.Parameter(kept.clone(), requires_grad=False)
    return width


def prompt(network: Any, load: Load, merge: int) -> dict[str, torch.Tensor]:
    """A prompt as long as the context, with square images of noise, where the network is."""
    config, vision, device = network.config, network.config.vision_config, network.device
    side = round(load.pixels**0.5) // vision.patch_size // merge * merge
    image = [config.image_token_id] * (side // merge) ** 2 + [config.vision_end_token_id]
    text = load.context - load.images * len(image)
    ids = torch.tensor([image * load.images + [100] * text] * load.batch, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if count := load.images * load.batch:
        numbers = 3 * vision.temporal_patch_size * vision.patch_size**2
        inputs |= {
            "mm_token_type_ids": (ids == config.image_token_id).int(),
            "pixel_values": torch.randn(count * side**2, numbers, device=device),
            "image_grid_thw": torch.tensor([[1, side, side]] * count, device=device),
        }
    return inputs


def _latency(built: Built, meter: Meter) -> dict[str, Any]:
    """A profile of the dense model."""
    network = built.network
    meter.start()
    return profiled(network, built.family, built.space, _CONTEXT, "random weights").as_dict()
