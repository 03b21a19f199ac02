"""What each worker process builds once: an evaluator."""

from collections.abc import Sequence

import numpy as np
import torch

from lop.model.adapter import load_model
from lop.model.elastic import ElasticModel
from lop.model.encoding import encode
from lop.model.find import find_model
from lop.model.samples import Sample
from lop.run.config import Config
from lop.search.evaluator import Evaluator
from lop.search.racing import Racing, sample_rounds


def build_evaluator(config: Config, order: np.ndarray, samples: Sequence[Sample]) -> Evaluator:
    """An evaluator on the given samples; what each worker process calls once.

    Args:
        order: [L, F] neurons of each layer, the most important first.
    """
    torch.set_num_threads(config.threads)
    model = load_model(find_model(config.model), device=config.device, dtype=config.dtype)
    races = config.search.racing
    rounds = sample_rounds(len(samples), races.rounds, seed=config.seed) if races else None
    encoded = encode(model, samples, batch_tokens=config.batch_tokens, rounds=rounds, images=config.images)
    return Evaluator(
        ElasticModel(model, order, compiled=config.compile),
        encoded,
        racing=Racing(races.rounds, races.confidence) if races else None,
        divergence=config.search.needs_divergence,
        cache_bytes=config.cache_bytes,
    )
