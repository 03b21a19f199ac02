"""Evaluators of a run's reward samples on the actors of a cluster."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import ray
import torch

from lop.model.samples import Sample
from lop.run.building import build_evaluator
from lop.run.config import Config
from lop.search.evaluator import Evaluator
from ray_jobs.cluster import connected
from ray_jobs.fleet import Fleet
from ray_jobs.needs import Needs
from ray_jobs.share import put_shared


@contextmanager
def evaluator_fleet(config: Config, order: np.ndarray, samples: Sequence[Sample]) -> Iterator[Fleet]:
    """At most the config's number of actors, each with the model and the reward samples.

    On GPUs each actor loads the model from the shared path or its machine's cache. On CPUs it is loaded and the samples
    are encoded once, here, and the actors of a machine share one copy in memory.

    Args:
        order: [L, F] neurons of each layer, the most important first.

    Raises:
        LopError: the cluster cannot be reached, or has no machine for an actor and never will.
    """
    needs = Needs.of(config)
    with connected():
        needs.check()
        build = (_build_on_gpu if needs.gpus else _share_on_cpu)(config, order, samples)
        with Fleet(build, count=config.workers, needs=needs, seconds=config.evaluation_seconds) as fleet:
            yield fleet


def _build_on_gpu(config: Config, order: np.ndarray, samples: Sequence[Sample]) -> Callable[[], Evaluator]:
    return partial(_build, config, ray.put((order, tuple(samples))))


def _build(config: Config, inputs: ray.ObjectRef) -> Evaluator:
    return build_evaluator(config, *ray.get(inputs))


def _share_on_cpu(config: Config, order: np.ndarray, samples: Sequence[Sample]) -> Callable[[], Evaluator]:
    evaluator = build_evaluator(config.model_copy(update={"device": "cpu"}), order, samples)
    return partial(_receive, put_shared(evaluator), config.threads)


def _receive(evaluator: ray.ObjectRef, threads: int) -> Evaluator:
    torch.set_num_threads(threads)
    found: Evaluator = ray.get(evaluator)
    return found
