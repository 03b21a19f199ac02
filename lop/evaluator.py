"""One allocation scored on a set of samples."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from lop.allocation import Allocation
from lop.elastic import ElasticModel
from lop.encoding import Batch, Encoded


@dataclass(frozen=True)
class Scores:
    """What a model said to each sample.

    Attributes:
        correct: [n] bool, whether greedy generation writes exactly the answer.
        log_probability: [n] float64, of the answer, summed over its tokens, in nats.
    """

    correct: np.ndarray
    log_probability: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """One allocation's result on the reward samples.

    Attributes:
        accuracy: share of samples answered exactly.
        log_probability: mean over samples of the right answer's log-probability, in nats.
        error: why the allocation could not be evaluated; empty where it was.
    """

    accuracy: float
    log_probability: float
    error: str = ""

    @classmethod
    def failed(cls, error: str) -> "Evaluation":
        """What stands for an allocation that cannot be evaluated: the worst result.

        No answer right, and each as improbable as two tokens guessed among 150,000: finite, because a tree averages.
        """
        return cls(accuracy=0.0, log_probability=-24.0, error=error)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; `error` only where there is one."""
        values = asdict(self)
        return values if self.error else {name: value for name, value in values.items() if name != "error"}


class Evaluator:
    """Scores allocations of one elastic model on one encoded set of samples."""

    def __init__(self, elastic: ElasticModel, encoded: Encoded) -> None:
        self._elastic = elastic
        self._encoded = encoded

    def evaluate(self, allocation: Allocation) -> Evaluation:
        """The allocation's result; the model is dense again afterwards."""
        with self._elastic.pruned(allocation):
            scores = self.scores()
        return Evaluation(float(scores.correct.mean()), float(scores.log_probability.mean()))

    @torch.inference_mode()
    def scores(self) -> Scores:
        """Scores each sample with the widths that the model has now."""
        right = np.zeros(self._encoded.count, dtype=np.int64)
        wanted = np.zeros(self._encoded.count, dtype=np.int64)
        total = np.zeros(self._encoded.count)
        for batch in self._encoded.batches:
            hits, log_probabilities = self._answer(batch)
            owners = batch.samples.cpu().numpy()
            np.add.at(right, owners, hits)
            np.add.at(wanted, owners, 1)
            np.add.at(total, owners, log_probabilities)
        return Scores(right == wanted, total)

    def _answer(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """[N] whether each answer token is the likeliest, and [N] its log-probability."""
        model = self._elastic.model
        # Padding stands on the right, where a causal model's real tokens never look: no mask is needed.
        output = model.backbone(inputs_embeds=batch.embeddings, position_ids=batch.positions, use_cache=False)
        logits = model.head(output.last_hidden_state[batch.rows, batch.columns]).float()
        chosen = logits.gather(1, batch.tokens[:, None])[:, 0]
        log_probability = chosen - logits.logsumexp(1)
        hits = logits.argmax(1) == batch.tokens
        return hits.cpu().numpy(), log_probability.double().cpu().numpy()
