"""Evaluators of a run's reward samples on the actors of a cluster."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import ray
import torch

from lop.model.samples import Sample
from lop.run.building import Materials, build_scorer
from lop.search.evaluation import Scorer
from ray_jobs.cluster import connected
from ray_jobs.fleet import Fleet
from ray_jobs.needs import Needs
from ray_jobs.share import put_shared


@contextmanager
def evaluator_fleet(materials: Materials, *samples: Sequence[Sample]) -> Iterator[Fleet]:
    """At most the config's number of actors, each with the model and the samples.

    On GPUs each actor loads the model from the shared path or its machine's cache. On CPUs it is loaded and the samples
    are encoded once, here, and the actors of a machine share one copy in memory.

    Args:
        samples: to search on, and those kept back (`lop.run.building.build_scorer`).

    Raises:
        LopError: the cluster cannot be reached, or has no machine for an actor and never will.
    """
    config = materials.config
    needs = Needs.of(config)
    with connected():
        needs.check()
        build = (_build_on_gpu if needs.gpus else _share_on_cpu)(materials, *samples)
        with Fleet(build, count=config.workers, needs=needs, seconds=config.evaluation_seconds) as fleet:
            yield fleet


def _build_on_gpu(materials: Materials, *samples: Sequence[Sample]) -> Callable[[], Scorer]:
    return partial(_build, ray.put((materials, *samples)))


def _build(inputs: ray.ObjectRef) -> Scorer:
    return build_scorer(*ray.get(inputs))


def _share_on_cpu(materials: Materials, *samples: Sequence[Sample]) -> Callable[[], Scorer]:
    config = materials.config.model_copy(update={"device": "cpu"})
    evaluator = build_scorer(replace(materials, config=config), *samples)
    return partial(_receive, put_shared(evaluator), config.threads)


def _receive(evaluator: ray.ObjectRef, threads: int) -> Scorer:
    torch.set_num_threads(threads)
    found: Scorer = ray.get(evaluator)
    return found
