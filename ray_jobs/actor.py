"""The actor that holds one model and scores allocations on it."""

import os
from collections.abc import Callable
from typing import Protocol

import ray
import torch

from lop.allocation import Allocation
from lop.evaluator import Evaluation


class Evaluates(Protocol):
    """What an actor needs of the thing it holds."""

    def evaluate(self, allocation: Allocation) -> Evaluation:
        """One allocation's result."""


@ray.remote(max_restarts=0, max_task_retries=0)
class EvaluatorActor:
    """Loads nothing until `prepare` is called, so that a failure to load reaches the driver as the error it is."""

    def __init__(self, build: Callable[[], Evaluates]) -> None:
        self._build = build
        self._evaluator: Evaluates | None = None

    def prepare(self) -> int:
        """Builds the evaluator, and returns the process id."""
        # Actors share a machine's cores: one thread each, unless `build` sets another number.
        torch.set_num_threads(1)
        self._evaluator = self._build()
        return os.getpid()

    def evaluate(self, allocation: Allocation) -> Evaluation:
        """One allocation's result."""
        assert self._evaluator is not None
        return self._evaluator.evaluate(allocation)
