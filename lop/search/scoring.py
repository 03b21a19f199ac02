"""What a backbone says to encoded samples, however it came to its weights."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lop.model.backbone import Backbone
from lop.model.encoding import Batch, Encoded, on_device

# Tokens whose logits are in memory together: 0.6 GiB of float32 with Qwen2.5-VL's vocabulary.
_LOGITS = 1024


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


class Scoring:
    """A backbone and the samples that it is scored on.

    Args:
        backbone: scored as it is at each call.
    """

    def __init__(self, backbone: Backbone, encoded: Encoded) -> None:
        self.encoded = encoded
        self._backbone = backbone
        self.device = backbone.head.device

    @torch.inference_mode()
    def scores(self, dense: Sequence[Tensor] | None = None) -> Scores:
        """Scores each sample, compared with what the dense model's `all_tails` gave if that is given."""
        tally = Tally(self.encoded)
        for batches in self.rounds():
            for index, batch in batches:
                self.add(tally, batch, dense=None if dense is None else dense[index])
        return tally.scores()

    def rounds(self) -> Iterator[Iterator[tuple[int, Batch]]]:
        """The batches of each round with their index among all batches, on the model's device."""
        first = 0
        for batches in self.encoded.rounds:
            yield enumerate(on_device(batches, self.device), first)
            first += len(batches)

    def add(
        self, tally: "Tally", batch: Batch, x: Tensor | None = None, *, first: int = 0, dense: Tensor | None = None
    ) -> None:
        """Adds to a tally what is said to a batch.

        Args:
            x: [N, H], the states before layer `first`; the embeddings if None.
            dense: [M, H], what the dense model's `tails` gave, to compare with.
        """
        tails = self.tails(batch, x, first=first)
        # Of prose every token has logits: all at once, with a vocabulary of 152,000, would be gigabytes.
        for start in range(0, len(batch.places), _LOGITS):
            part = slice(start, start + _LOGITS)
            places = batch.places[part]
            compared = None if dense is None else self._logits(dense[places.to(dense.device)]).log_softmax(1)
            tally.add(batch, part, self._logits(tails[places]), compared)

    def tails(self, batch: Batch, x: Tensor | None = None, *, first: int = 0) -> Tensor:
        """The normed states [M, H] at the tails of a batch after the last layer; arguments as in `add`."""
        states = batch.embeddings if x is None else x
        return self._backbone.answers(states, batch.rotation, batch.groups, batch.tails, first=first)

    @torch.inference_mode()
    def all_tails(self) -> list[Tensor]:
        """`tails` of each batch, in host memory."""
        return [self.tails(batch).cpu() for batch in on_device(self.encoded.batches, self.device)]

    def hidden(self, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
        """Batch by batch the states [N, H] before each of some layers, in host memory."""
        for batch in on_device(self.encoded.batches, self.device):
            states = self._backbone.hidden(batch.embeddings, batch.rotation, batch.groups, last=max(layers))
            yield {layer: x.cpu() for layer, x in enumerate(states, start=1) if layer in layers}

    def _logits(self, tails: Tensor) -> Tensor:
        return self._backbone.logits(tails.to(self.device)).float()


class Tally:
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
