"""One allocation scored on a set of samples."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lop.model.elastic import ElasticModel
from lop.model.encoding import Batch, Encoded, on_device
from lop.search.evaluation import Evaluation
from lop.search.racing import Candidate, Opponent, Racing, gives_up, pack, unpack
from lop.space.allocation import Allocation


@dataclass(frozen=True)
class Scores:
    """What a model said to each sample.

    Of prose, log-probability and divergence are means over its tokens, not sums: a long passage weighs as much as a
    question.

    Attributes:
        correct: [n] bool, whether greedy generation writes exactly the answer; of prose, every token of it.
        log_probability: [n] float64, of the answer, summed over its tokens, in nats.
        margin: [n] float64, by which the answer's tokens are likelier than the likeliest others: the least
            difference of log-probabilities over its tokens, in nats; not below zero where `correct`.
        divergence: [n] float64, KL(dense ‖ this) of the distributions of the answer's tokens, summed, in nats; zero
            if they were not compared.
    """

    correct: np.ndarray
    log_probability: np.ndarray
    margin: np.ndarray
    divergence: np.ndarray


# Tokens whose logits are in memory together: 0.6 GiB of float32 with Qwen2.5-VL's vocabulary.
_LOGITS = 1024


class Evaluator:
    """Scores allocations of one elastic model on one encoded set of samples.

    Args:
        racing: how candidates race, if they do; `encoded` must have its rounds.
        divergence: whether to compare with the dense model's distributions, which are computed when first needed.
        cache_bytes: memory for the dense model's states between layers, also computed when first needed: an
            allocation that prunes nothing of the first layers starts after them, with the same result.
    """

    def __init__(
        self,
        elastic: ElasticModel,
        encoded: Encoded,
        *,
        racing: Racing | None = None,
        divergence: bool = False,
        cache_bytes: int = 0,
    ) -> None:
        self._elastic = elastic
        self._backbone = elastic.backbone
        self._device = elastic.backbone.head.device
        self._encoded = encoded
        self._racing = racing
        self._divergence = divergence
        self._cached_layers = _spread_layers(elastic, encoded, cache_bytes)

    @torch.inference_mode()
    def evaluate(self, candidate: Candidate) -> Evaluation:
        """The candidate's result, given up early where it loses to its opponent; then the model is dense again."""
        allocation, opponent = candidate.allocation, candidate.opponent
        start = self._start(allocation)
        states = self._dense_states[start] if start else None
        distributions = self._dense_distributions if self._divergence else None
        tally = _Tally(self._encoded)
        with self._elastic.pruned(allocation):
            for batches in self._rounds():
                for index, batch in batches:
                    x = batch.embeddings if states is None else states[index].to(self._device)
                    dense = None if distributions is None else distributions[index]
                    for part, logits in self._logits(batch, x, start):
                        tally.add(batch, part, logits, None if dense is None else dense[part].to(self._device))
                if self._loses(tally, opponent):
                    break
        return self._evaluation(tally, opponent)

    @torch.inference_mode()
    def scores(self) -> Scores:
        """Scores each sample with the widths, and biases, that the model has now."""
        tally = _Tally(self._encoded)
        for batches in self._rounds():
            for _, batch in batches:
                for part, logits in self._logits(batch, batch.embeddings, 0):
                    tally.add(batch, part, logits, None)
        return tally.scores()

    def _rounds(self) -> Iterator[Iterator[tuple[int, Batch]]]:
        """The batches of each round with their index among all batches, on the model's device."""
        first = 0
        for batches in self._encoded.rounds:
            yield enumerate(on_device(batches, self._device), first)
            first += len(batches)

    def _logits(self, batch: Batch, x: Tensor, start: int) -> Iterator[tuple[slice, Tensor]]:
        """Logits [n, V] where the answers' tokens are predicted, for one part of the A tokens after the other.

        From the states x [N, H] before layer `start`. Of prose every token has logits: all at once, with a vocabulary
        of 152,000, would be gigabytes.
        """
        tails = self._backbone.answers(x, batch.rotation, batch.groups, batch.tails, first=start)
        for first in range(0, len(batch.places), _LOGITS):
            part = slice(first, first + _LOGITS)
            yield part, self._backbone.logits(tails[batch.places[part]]).float()

    def _start(self, allocation: Allocation) -> int:
        """The last layer up to which the allocation is dense and before which the dense states are kept, or 0."""
        dense = self._backbone.layers[0].ffn.neurons
        first = next((layer for layer, width in enumerate(allocation.widths) if width != dense), len(allocation.widths))
        return max((layer for layer in self._cached_layers if layer <= first), default=0)

    @cached_property
    def _dense_states(self) -> dict[int, list[Tensor]]:
        """For each cached layer the states [N, H] before it, batch by batch, in host memory."""
        states: dict[int, list[Tensor]] = {layer: [] for layer in self._cached_layers}
        for batch in on_device(self._encoded.batches, self._device):
            last = max(self._cached_layers)
            hidden = self._backbone.hidden(batch.embeddings, batch.rotation, batch.groups, last=last)
            for layer, x in enumerate(hidden, start=1):
                if layer in states:
                    states[layer].append(x.cpu())
        return states

    @cached_property
    def _dense_distributions(self) -> list[Tensor]:
        """The log-probabilities [A, V] of each batch's answer tokens, in host memory and float32."""
        return [
            torch.cat([logits.log_softmax(1).cpu() for _, logits in self._logits(batch, batch.embeddings, 0)])
            for batch in on_device(self._encoded.batches, self._device)
        ]

    def _loses(self, tally: "_Tally", opponent: Opponent | None) -> bool:
        if self._racing is None or opponent is None or tally.seen.all():
            return False
        asked = self._encoded.asked
        return gives_up(
            self._racing, tally.correct[asked], tally.seen[asked], unpack(opponent.hits, self._encoded.count)[asked]
        )

    def _evaluation(self, tally: "_Tally", opponent: Opponent | None) -> Evaluation:
        scores, seen = tally.scores(), tally.seen
        asked = self._encoded.asked
        answered = seen & asked
        accuracy = float(scores.correct[asked].mean()) if asked.any() else 0.0
        if opponent is not None and not seen.all() and answered.any():
            hits = unpack(opponent.hits, self._encoded.count)
            gain = scores.correct[answered].mean() - hits[answered].mean()
            accuracy = float(max(hits[asked].mean() + gain, 0))
        return Evaluation(
            accuracy=accuracy,
            log_probability=float(scores.log_probability[seen].mean()),
            margin=float(scores.margin[answered].mean()) if answered.any() else None,
            divergence=float(scores.divergence[seen].mean()) if self._divergence else None,
            hits=None if self._racing is None else pack(scores.correct),
            opponent=None if opponent is None else opponent.allocation.widths,
            scored=None if seen.all() else int(seen.sum()),
        )


class _Tally:
    """Adds up what batches say about samples."""

    def __init__(self, encoded: Encoded) -> None:
        samples = encoded.count
        self._prose = ~encoded.asked
        self._tokens = np.zeros(samples, dtype=np.int64)
        self._missed = np.zeros(samples, dtype=np.int64)
        self._log_probability = np.zeros(samples)
        self._margin = np.full(samples, np.inf)
        self._divergence = np.zeros(samples)
        self.seen = np.zeros(samples, dtype=bool)

    @property
    def correct(self) -> np.ndarray:
        """[n] bool, whether all the answer's tokens are the likeliest."""
        return self.seen & (self._missed == 0)

    def add(self, batch: Batch, part: slice, logits: Tensor, dense: Tensor | None) -> None:
        """Adds logits [n, V] of a part of a batch's tokens, and the dense log-probabilities [n, V] to compare with."""
        owners, tokens = batch.samples[part].cpu().numpy(), batch.tokens[part]
        self.seen[owners] = True
        np.add.at(self._tokens, owners, 1)
        normaliser = logits.logsumexp(1)
        right = logits.gather(1, tokens[:, None])[:, 0]
        if dense is not None:
            divergence = _divergence(dense, logits, normaliser)
            np.add.at(self._divergence, owners, divergence.double().cpu().numpy())
        other, other_token = logits.scatter_(1, tokens[:, None], -torch.inf).max(1)
        # Of equal logits greedy generation takes the first.
        missed = (other > right) | ((other == right) & (other_token < tokens))
        np.add.at(self._missed, owners, missed.cpu().numpy())
        np.add.at(self._log_probability, owners, (right - normaliser).double().cpu().numpy())
        np.minimum.at(self._margin, owners, (right - other).double().cpu().numpy())

    def scores(self) -> Scores:
        """What has been added."""
        tokens = np.where(self._prose & self.seen, self._tokens, 1)
        return Scores(self.correct, self._log_probability / tokens, self._margin, self._divergence / tokens)


def _divergence(dense: Tensor, logits: Tensor, normaliser: Tensor) -> Tensor:
    """[A], `Σ_v p_v·(log p_v − log q_v)` for the dense log p [A, V] and the logits of q."""
    return (dense.exp() * (dense - logits)).sum(1) + normaliser


def _spread_layers(elastic: ElasticModel, encoded: Encoded, cache_bytes: int) -> tuple[int, ...]:
    """The layers before which to keep the dense states: as many as the memory holds, evenly spread."""
    layers = len(elastic.backbone.layers)
    size = sum(batch.embeddings.nbytes for batch in encoded.batches)
    count = min(cache_bytes // size, layers - 1)
    return tuple(round((number + 1) * layers / (count + 1)) for number in range(count))
