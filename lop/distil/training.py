"""A student learns from its teacher's notes, is judged on the reward samples, and keeps the best it has been."""

import logging
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lop.distil.loss import distance, divergence
from lop.distil.plan import Lesson, lesson, steps_of, weight_of
from lop.distil.student import Reader, Student
from lop.distil.teacher import Note
from lop.errors import CancelledError, LopError
from lop.model.adapter import QwenVL
from lop.model.encoding import Encoded, EncodedSample
from lop.run.settings import DistilSettings
from lop.search.scoring import Scoring, Tally
from lop.storage.files import atomic_file

log = logging.getLogger(__name__)
# Of the steps, over which the learning rate rises; it falls by a cosine to a tenth.
_RISE = 0.05
_LAST = 0.1
_CLIP = 1.0


@dataclass
class State:
    """How far a training has come; all of it is in one file, which is replaced as a whole.

    Attributes:
        step: steps done.
        tokens: that they read.
        curve: pairs of tokens read and the KL to the dense model on the reward samples; the first is the start's.
        best: of these the index of the least KL.
        weights: the checkpoint's tensors there, None at the start, where nothing has changed.
        learner: the parameters that learn, by number; None before the first step.
        optimizer: what torch keeps of it.
    """

    step: int = 0
    tokens: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    weights: dict[str, Tensor] | None = None
    learner: list[Tensor] | None = None
    optimizer: dict[str, Any] | None = None

    @property
    def since_best(self) -> int:
        """Looks since the best one, which have not helped."""
        return len(self.curve) - 1 - self.best


@dataclass(frozen=True)
class Judge:
    """The reward samples with what the dense model says to them: what decides which weights are kept.

    Attributes:
        tails: of the dense model, one for each batch (`lop.distil.teacher.Notes.tails`).
    """

    encoded: Encoded
    tails: Sequence[Tensor]

    @torch.inference_mode()
    def divergences(self, model: QwenVL) -> np.ndarray:
        """[n] KL(dense ‖ model) of each sample, in nats: what a search's reward `divergence` is the mean of."""
        scoring = Scoring(model.lean_backbone(), self.encoded)
        tally = Tally(self.encoded)
        for batches in scoring.rounds():
            for index, batch in batches:
                scoring.add(tally, batch, dense=self.tails[index])
        return tally.scores().divergence


class Training:
    """One student's.

    Args:
        accelerator: `accelerate`'s, on whose device the student is.
        samples, notes: what is learnt from, and what the teacher says to each.
        file: of the state; gone on with if it is there.
        seed: of the samples' order.

    Raises:
        LopError: the file is damaged.
    """

    def __init__(
        self,
        accelerator: Any,
        student: Student,
        samples: Sequence[EncodedSample],
        notes: Callable[[int], Note],
        judge: Judge,
        settings: DistilSettings,
        *,
        file: Path,
        seed: int,
    ) -> None:
        self._accelerator, self._student, self._settings = accelerator, student, settings
        self._samples, self._notes, self._judge, self._file = samples, notes, judge, file
        self._lengths = [sample.length for sample in samples]
        self._weights = [weight_of(sample, prompt=settings.prompt) for sample in samples]
        self._steps = steps_of(
            self._lengths,
            tokens=settings.tokens,
            batch_tokens=settings.batch_tokens,
            seed=seed,
            processes=accelerator.num_processes,
        )
        optimizer = torch.optim.AdamW(
            student.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0
        )
        self._reader, self._optimizer = accelerator.prepare(Reader(student, settings.layers), optimizer)
        self._state = self._resumed()

    def run(
        self,
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> State:
        """Learns to the end, or to where it no longer helps; returns the state with the best weights.

        Args:
            progress: told the steps done and in all.
            cancelled: asked after each step whether to give up.

        Raises:
            CancelledError: `cancelled` said so; the file has what was there when it was last looked.
        """
        state, settings = self._state, self._settings
        if not state.curve:
            self._look()
        for taught in self._lessons(self._steps[state.step :]):
            if state.since_best >= settings.patience:
                break
            progress(state.step, len(self._steps))
            self._learn(self._steps[state.step], taught)
            state.tokens += sum(self._lengths[index] for index in self._steps[state.step])
            state.step += 1
            if state.step % settings.every == 0 or state.step == len(self._steps):
                self._look()
                self._save()
            if cancelled():
                raise CancelledError("the distillation was cancelled")
        progress(len(self._steps), len(self._steps))
        return state

    def _lessons(self, steps: Sequence[Sequence[int]]) -> Iterator[Lesson]:
        """What this process reads in each step; each lesson is put together while the one before it is learnt."""
        accelerator = self._accelerator
        on_gpu = accelerator.device.type == "cuda"

        def prepared(step: Sequence[int]) -> Lesson:
            mine = step[accelerator.process_index :: accelerator.num_processes]
            samples, notes = [self._samples[index] for index in mine], [self._notes(index) for index in mine]
            found = lesson(samples, notes, prompt=self._settings.prompt)
            return found.moved(Tensor.pin_memory) if on_gpu else found

        def moved(coming: Future[Lesson]) -> Lesson:
            return coming.result().moved(lambda value: value.to(accelerator.device, non_blocking=True))

        coming: Future[Lesson] | None = None
        with ThreadPoolExecutor(1) as ahead:
            for step in steps:
                before, coming = coming, ahead.submit(prepared, step)
                if before is not None:
                    yield moved(before)
            if coming is not None:
                yield moved(coming)

    def _learn(self, step: Sequence[int], taught: Lesson) -> None:
        accelerator, settings = self._accelerator, self._settings
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(self._state.step, len(self._steps))
        # All processes' places count alike; `accelerate` takes the mean of their gradients.
        scale = accelerator.num_processes / sum(self._weights[index] for index in step)
        accelerator.backward(scale * self._loss(taught))
        accelerator.clip_grad_norm_(self._student.parameters(), _CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _loss(self, taught: Lesson) -> Tensor:
        """The sum over a lesson's places of what each counts times how far the student is from the teacher."""
        settings, head = self._settings, self._student.head
        out, *states = self._reader(taught.embeddings, taught.rotation, taught.groups)
        loss = (taught.weights * divergence(taught.likeliest, out[taught.text].to(head.dtype), head)).sum()
        for known, found in zip(taught.states, states):
            apart = distance(known, found[taught.text])
            loss = loss + settings.states / len(states) * (taught.weights * apart).sum()
        return loss

    def _look(self) -> None:
        """Judges the weights that there are now, and keeps them if they are the best so far."""
        state = self._state
        weights = self._student.weights() if state.step else None
        value = 0.0
        if self._accelerator.is_main_process:
            if weights is not None:
                self._student.ship(weights)
            value = float(self._judge.divergences(self._student.shipped).mean())
        value = _told(value)
        state.curve.append((state.tokens, value))
        start = state.curve[0][1]
        if value < state.curve[state.best][1]:
            state.best, state.weights = len(state.curve) - 1, weights
        log.info(
            "distil: step %d of %d, %s tokens: KL to dense %.4f on the reward samples (%.4f at the start)",
            state.step,
            len(self._steps),
            f"{state.tokens:,}",
            value,
            start,
        )

    def _save(self) -> None:
        state = self._state
        state.learner = [parameter.detach() for parameter in self._student.parameters()]
        state.optimizer = self._optimizer.state_dict()
        if self._accelerator.is_main_process:
            with atomic_file(self._file) as temporary:
                torch.save({name: getattr(state, name) for name in asdict(State())}, temporary)
        self._accelerator.wait_for_everyone()

    def _resumed(self) -> State:
        if not self._file.exists():
            return State()
        try:
            state = State(**torch.load(self._file, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError):
            raise LopError(f"{self._file} is damaged: remove it, and the training begins anew") from None
        assert state.learner is not None
        assert state.optimizer is not None
        with torch.no_grad():
            for parameter, value in zip(self._student.parameters(), state.learner, strict=True):
                parameter.copy_(value)
        self._optimizer.load_state_dict(state.optimizer)
        log.info("distil: goes on after step %d of %d (%s)", state.step, len(self._steps), self._file)
        return state


def _rate(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, as a share of the highest."""
    rise = max(1, round(_RISE * steps))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * done)) / 2


def _told(value: float) -> float:
    """The main process's value, in every process."""
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values)
    return values[0]
