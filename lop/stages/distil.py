"""From a pruned checkpoint to one of the same shape that has learnt from the dense model."""

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from lop import __version__
from lop.checkpoint.export import read_manifest, rewrite, verify
from lop.distil.student import Student, check_peft
from lop.distil.teacher import Notes
from lop.distil.texts import text_samples
from lop.distil.training import Judge, State, Training
from lop.errors import LopError
from lop.model.adapter import load_model, place_and_dtype
from lop.model.encoding import Encoded, EncodedSample, encode, encode_each
from lop.model.find import find_model, find_samples, fingerprint_model
from lop.model.samples import Sample, SampleSets, fingerprint_samples, load_sample_sets, load_samples
from lop.model.sources import check_checkpoint, check_config
from lop.run.config import Config
from lop.stages.calibrate import warn_of_samples
from lop.storage.destination import check_new, check_writable
from lop.storage.files import disk_errors
from lop.storage.fingerprint import fingerprint
from lop.storage.headers import TensorInfo, read_header, read_tensors
from lop.storage.location import Location
from lop.storage.lock import locked

log = logging.getLogger(__name__)
WORK = Path("runs/distil")
Progress = Callable[[str, int, int], None]


def _silent(step: str, done: int, total: int) -> None:
    """Shows no progress."""


@dataclass(frozen=True)
class Lessons:
    """What is learnt from, and what decides whether it helped; disjoint, and both from the test samples."""

    samples: tuple[Sample, ...]
    reward: tuple[Sample, ...]

    @classmethod
    def of(cls, config: Config, texts: Sequence[Path], folders: Sequence[Path]) -> "Lessons":
        """The config's calibration samples, text files, and other folders' calibration samples; some reward samples.

        Raises:
            LopError: one of them is missing or damaged, or has what the reward or test samples have.
        """
        sets = load_sample_sets(find_samples(config.samples))
        more = [load_samples(find_samples(str(folder)) / "calibration.parquet") for folder in folders]
        samples = sum([sets.calibration, *more, *map(text_samples, texts)], ())
        SampleSets(samples, sets.reward, sets.test)  # Looks whether they are disjoint.
        count = min(config.distil.reward_samples, len(sets.reward))
        chosen = np.sort(np.random.default_rng(config.seed).permutation(len(sets.reward))[:count])
        return cls(samples, tuple(sets.reward[index] for index in chosen))


def distil_stage(
    config: Config,
    checkpoint: Path,
    out: str | Path | Location,
    *,
    texts: Sequence[Path] = (),
    folders: Sequence[Path] = (),
    work: Path = WORK,
    progress: Progress = _silent,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Has a checkpoint that LOP exported learn from its dense model, and writes what comes of it as one like it.

    Never worse than it began: what is written are the weights with the least KL to the dense model on reward samples
    that it was seen with, the start's included. Where several processes run it (`accelerate launch`), they share the
    samples of each step, and the first one writes.

    Args:
        config: its `model` is the dense one.
        out: as in `lop.stages.prune.export_allocation`.
        texts: text files to learn from, too.
        folders: with samples to learn from, too: their `calibration.parquet`.
        work: where the teacher's notes are kept, for every student of the same samples, and the state of a training
            until it is done: the same call goes on with it.
        progress: called with the step (`"teacher"`, counted in tokens, `"distil"`, in steps, or `"export"`, in bytes),
            how much of it is done, and how much it is in all.
        cancelled: asked after each step, and about every 8 MiB of the export, whether to give up.

    Returns:
        The manifest, as it stands in `lop.json`: `recovery` is `distil`, and the last of `distilled` says how.

    Raises:
        LopError: the checkpoint is none that LOP exported, or damaged, or was pruned from another model than the
            config's; samples are missing or not disjoint; or `out` is there already.
        CancelledError: `cancelled` said so.
        OSError: the disk is full or read-only.
    """
    settings, place = config.distil, Location.parse(out)
    manifest, teacher = _checked(checkpoint, config)
    lessons = Lessons.of(config, texts, folders)
    if settings.lora_rank:
        check_peft()
    check_new(place, bytes=sum(info.bytes for info in read_tensors(checkpoint).values()))
    check_writable(Location.parse(work))
    warn_of_samples(config)
    torch.set_num_threads(config.threads)
    accelerator = _accelerator(config, checkpoint)
    if not accelerator.is_main_process:  # One speaks for all.
        logging.getLogger("lop").setLevel(logging.WARNING)
        progress = _silent
    device = str(accelerator.device)
    parts = manifest["widths"], manifest.get("groups")
    student = Student(checkpoint, *parts, settings, device=device, dtype=config.dtype, seed=config.seed)
    log.info("distil: %d samples go through the vision tower", len(lessons.samples) + len(lessons.reward))
    samples = list(encode_each(student.shipped, lessons.samples, config.images))
    reward = encode(student.shipped, lessons.reward, batch_tokens=config.batch_tokens, images=config.images)
    notes = Notes.below(work, _origin(config, lessons, teacher, student))
    # Of several students of the same teacher that begin at once, one writes the notes, and the others wait for them.
    with accelerator.main_process_first(), locked(notes.folder / "lock"):
        if not notes.are_there:
            _take_notes(notes, teacher, samples, reward, config, device, progress)
    about = {
        "from": fingerprint_model(checkpoint),
        "samples": fingerprint_samples(lessons.samples, max_pixels=config.images.max_pixels),
        "settings": settings.model_dump(mode="json"),
        "seed": config.seed,
    }
    folder = work / f"student-{fingerprint([about, dict(notes.made_from)])}"
    judge = Judge(reward, notes.tails())
    training = Training(
        accelerator, student, samples, notes.reader(), judge, settings, file=folder / "state.pt", seed=config.seed
    )
    state = training.run(progress=lambda done, total: progress("distil", done, total), cancelled=cancelled)
    manifest |= {
        "version": __version__,
        "recovery": "distil",
        "distilled": [*manifest.get("distilled", []), {**about, **_record(state, len(lessons.reward))}],
    }
    if accelerator.is_main_process:
        manifest = rewrite(
            checkpoint,
            place,
            _stored(state.weights or {}, folder),
            dense=teacher,
            about=manifest,
            progress=lambda done, total: progress("export", done, total),
            cancelled=cancelled,
        )
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    return manifest


def _checked(checkpoint: Path, config: Config) -> tuple[dict[str, Any], Path]:
    """The manifest of an undamaged checkpoint, and the folder of its dense model."""
    known = read_manifest(checkpoint).get("fingerprints", {}).get("model")
    check_config(checkpoint)
    try:
        teacher = find_model(config.model)
    except LopError as error:
        raise LopError(f"the dense model that {checkpoint} would learn from: {error} (--model names it)") from None
    check_checkpoint(teacher, dense=True)
    if known != (found := fingerprint_model(teacher)):
        raise LopError(
            f"{checkpoint} was pruned from another model (fingerprint {known}) than {config.model} ({found}): "
            "name that one with --model"
        )
    manifest = verify(checkpoint)
    check_checkpoint(checkpoint)
    return manifest, teacher


def _accelerator(config: Config, checkpoint: Path) -> Any:
    """What has the training run where the config says, in the dtype that the model is computed in there."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    place, kind = place_and_dtype(config.device, config.dtype, checkpoint)
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)
    AcceleratorState._reset_state()  # Of an earlier call in this process, whose dtype may have been another.
    mixed = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(kind, "no")
    return Accelerator(cpu=place.type == "cpu", mixed_precision=mixed)


def _origin(config: Config, lessons: Lessons, teacher: Path, student: Student) -> Mapping[str, str]:
    """What the teacher's notes depend on."""
    pixels, settings = config.images.max_pixels, config.distil
    return {
        "model": fingerprint_model(teacher),
        "samples": fingerprint_samples(lessons.samples, max_pixels=pixels),
        "reward samples": fingerprint_samples(lessons.reward, max_pixels=pixels),
        "top_k and layers": fingerprint([settings.top_k, list(settings.layers)]),
        "arithmetic": f"{student.shipped.model.dtype}, {config.batch_tokens} tokens",
    }


def _take_notes(
    notes: Notes,
    teacher: Path,
    samples: Sequence[EncodedSample],
    reward: Encoded,
    config: Config,
    device: str,
    progress: Progress,
) -> None:
    model = load_model(teacher, device=device, dtype=config.dtype)
    depth, settings = len(model.layers), config.distil
    if too_deep := [layer for layer in settings.layers if layer >= depth]:
        raise LopError(f"distil.layers: there is no layer {too_deep[0]}: they are counted from 0 to {depth - 1}")
    notes.make(
        model.lean_backbone(),
        samples,
        reward,
        top_k=settings.top_k,
        layers=settings.layers,
        batch_tokens=config.batch_tokens,
        progress=lambda done, total: progress("teacher", done, total),
    )


def _record(state: State, reward_samples: int) -> dict[str, Any]:
    """What the manifest says of a training."""
    (_, start), (tokens, end) = state.curve[0], state.curve[state.best]
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "kept": "the start: no step was better" if state.weights is None else f"what {tokens:,} tokens made",
        "reward_samples": reward_samples,
        "reward_kl": {"start": start, "end": end},
        # What has come apart is no number in JSON.
        "curve": [[tokens, kl if math.isfinite(kl) else None] for tokens, kl in state.curve],
    }


def _stored(weights: Mapping[str, torch.Tensor], folder: Path) -> dict[str, TensorInfo]:
    """Weights in a file of the folder, for the export to read from."""
    if not weights:
        return {}
    file = folder / "weights.safetensors"
    with disk_errors(file):
        save_file(dict(weights), file)
    return read_header(file)
