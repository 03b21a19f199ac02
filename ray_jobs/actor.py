"""The actor that holds one model and scores allocations on it."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ray
import torch
from ray.exceptions import RayError

from lop.errors import LopError, first_line
from lop.search.evaluation import Evaluation, Scorer
from lop.search.racing import Candidate


@dataclass(frozen=True)
class Answer:
    """What became of one allocation on an actor.

    Attributes:
        evaluation: None where evaluating raised.
        error: what it raised, in one line.
        seconds: that it took.
    """

    evaluation: Evaluation | None
    error: str
    seconds: float


@ray.remote(max_restarts=0, max_task_retries=0)
class EvaluatorActor:
    """Loads nothing until `prepare` is called, so that a failure to load reaches the driver as the error it is."""

    def __init__(self, build: Callable[[], Scorer]) -> None:
        self._build = build
        self._evaluator: Scorer | None = None

    def prepare(self) -> int:
        """Builds the evaluator, and returns the process id."""
        # Actors share a machine's cores: one thread each, unless `build` sets another number.
        torch.set_num_threads(1)
        self._evaluator = self._build()
        return os.getpid()

    def evaluate(self, candidates: Sequence[Candidate]) -> list[Answer]:
        """Each candidate's result, or its error as text: an exception might not come to life in the driver."""
        assert self._evaluator is not None
        return [_answer(self._evaluator, candidate) for candidate in candidates]


def describe_error(error: BaseException) -> str:
    """An error in one line: its type and the first line of its message; of a LopError the message alone."""
    message, name = first_line(error), type(error).__name__
    return message if isinstance(error, LopError) or message == name else f"{name}: {message}"


def told(error: BaseException) -> str:
    """What was raised on the actor, in one line; where only its traceback came here, that one's last line."""
    if not isinstance(error, RayError):
        return describe_error(error)
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return describe_error(cause)
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _answer(evaluator: Scorer, candidate: Candidate) -> Answer:
    start = time.perf_counter()
    try:
        evaluation = evaluator.evaluate(candidate)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()  # Fragments of a failed pass must not make the next one fail.
        return Answer(None, describe_error(error), time.perf_counter() - start)
    return Answer(evaluation, "", time.perf_counter() - start)
