"""One allocation scored on a set of samples."""

from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lop.model.elastic import ElasticModel, Repair
from lop.model.encoding import Encoded
from lop.search.evaluation import Evaluation
from lop.search.racing import Candidate, Opponent, Racing, gives_up, pack, pack_values, trails, unpack, unpack_values
from lop.search.rewards import REWARDS
from lop.search.scoring import Scores, Scoring, Tally
from lop.space.allocation import Allocation


class Evaluator:
    """Scores allocations of one elastic model on one encoded set of samples.

    Args:
        repair: what makes up for pruned neurons, if anything does.
        racing: how candidates race, if they do; `encoded` must have its rounds.
        divergence: whether to compare with the dense model, whose last states are computed when first needed: its
            distributions would fill gigabytes, and cost no more than the head's product to make again.
        cache_bytes: memory for the dense model's states between layers, also computed when first needed: an
            allocation that prunes nothing of the first layers starts after them, with the same result.
    """

    def __init__(
        self,
        elastic: ElasticModel,
        encoded: Encoded,
        *,
        repair: Repair | None = None,
        racing: Racing | None = None,
        divergence: bool = False,
        cache_bytes: int = 0,
    ) -> None:
        self._elastic = elastic
        self._scoring = Scoring(elastic.backbone, encoded)
        self._encoded = encoded
        self._repair = repair
        self._racing = racing
        self._divergence = divergence
        self._cached_layers = _spread_layers(elastic, encoded, cache_bytes)

    def evaluate(self, candidate: Candidate) -> Evaluation:
        """The candidate's result, given up early where it loses to its opponent; then the model is dense again."""
        return self._evaluation(self._tally(candidate), candidate)

    def compared(self, allocation: Allocation) -> Scores:
        """What an allocation says to each of all samples, divergences included if they are asked for."""
        return self._tally(Candidate(allocation)).scores()

    @torch.inference_mode()
    def _tally(self, candidate: Candidate) -> Tally:
        allocation, opponent = candidate.allocation, candidate.opponent
        start = self._start(allocation)
        states = self._dense_states[start] if start else None
        dense = self._dense_tails if self._divergence else None
        tally = Tally(self._encoded)
        with self._elastic.pruned(allocation, self._repair):
            for batches in self._scoring.rounds():
                for index, batch in batches:
                    x = None if states is None else states[index].to(self._scoring.device)
                    self._scoring.add(tally, batch, x, first=start, dense=None if dense is None else dense[index])
                if self._loses(tally, opponent):
                    break
        return tally

    def remember(self) -> None:
        """Computes what the dense model says now, for weights that are changed afterwards."""
        self._dense_tails  # noqa: B018

    def now(self) -> Scores:
        """What the model says to each sample with the weights that it has now, compared with what `remember` saw."""
        return self._scoring.scores(self._dense_tails)

    def scores(self) -> Scores:
        """Scores each sample with the widths, weights and biases that the model has now."""
        return self._scoring.scores()

    def _start(self, allocation: Allocation) -> int:
        """The last layer up to which the allocation is dense and before which the dense states are kept, or 0."""
        first = self._elastic.first_pruned(allocation)
        return max((layer for layer in self._cached_layers if layer <= first), default=0)

    @cached_property
    def _dense_states(self) -> dict[int, list[Tensor]]:
        """For each cached layer the states [N, H] before it, batch by batch, in host memory."""
        batches = list(self._scoring.hidden(self._cached_layers))
        return {layer: [states[layer] for states in batches] for layer in self._cached_layers}

    @cached_property
    def _dense_tails(self) -> list[Tensor]:
        """The normed last states [M, H] at each batch's tails, in host memory."""
        return self._scoring.all_tails()

    def _loses(self, tally: Tally, opponent: Opponent | None) -> bool:
        racing, seen = self._racing, tally.seen
        if racing is None or opponent is None or seen.all():
            return False
        if racing.counts:
            asked = self._encoded.asked
            return gives_up(racing, tally.correct[asked], seen[asked], unpack(opponent.record, len(seen))[asked])
        raced = self._raced
        worth = self._worth(tally.scores())
        gains = (worth - unpack_values(opponent.record))[seen & raced]
        return len(gains) > 0 and trails(racing, gains, int(raced.sum()))

    @property
    def _raced(self) -> np.ndarray:
        """[n] bool, the samples that what is raced for has a value of."""
        assert self._racing
        of_answers = REWARDS[self._racing.reward].of_answers
        return self._encoded.asked if of_answers else np.ones(self._encoded.count, dtype=bool)

    def _worth(self, scores: Scores) -> np.ndarray:
        """[n] what each sample is worth by what is raced for, or else by its divergence; more is better."""
        reward = self._racing.reward if self._racing else "divergence"
        values: np.ndarray = getattr(scores, reward)
        return -values if REWARDS[reward].is_loss else values

    def _evaluation(self, tally: Tally, candidate: Candidate) -> Evaluation:
        scores, seen, opponent = tally.scores(), tally.seen, candidate.opponent
        asked = self._encoded.asked
        answered = seen & asked
        counts = self._racing is not None and self._racing.counts
        itemised = (self._racing is not None or candidate.itemised) and not counts and seen.all()
        found = Evaluation(
            accuracy=float(scores.correct[answered].mean()) if answered.any() else 0.0,
            log_probability=float(scores.log_probability[seen].mean()),
            margin=float(scores.margin[answered].mean()) if answered.any() else None,
            divergence=float(scores.divergence[seen].mean()) if self._divergence else None,
            hits=pack(scores.correct) if counts else None,
            values=pack_values(self._worth(scores)) if itemised else None,
            opponent=None if opponent is None else opponent.allocation.widths,
            scored=None if seen.all() else int(seen.sum()),
        )
        return found if seen.all() or opponent is None else self._estimated(found, scores, seen, opponent)

    def _estimated(self, found: Evaluation, scores: Scores, seen: np.ndarray, opponent: Opponent) -> Evaluation:
        """Of a race that was given up: what is raced for, estimated for all samples.

        A plain mean over those seen would tell candidates apart by which rounds they were in.
        """
        assert self._racing
        if self._racing.counts:
            asked = self._encoded.asked
            hits = unpack(opponent.record, len(seen))
            if not (seen & asked).any():
                return found
            gain = found.accuracy - hits[seen & asked].mean()
            return replace(found, accuracy=float(max(hits[asked].mean() + gain, 0)))
        raced = self._raced
        theirs = unpack_values(opponent.record)
        worth = float(theirs[raced].mean() + (self._worth(scores) - theirs)[seen & raced].mean())
        reward = self._racing.reward
        return replace(found, **{reward: -worth if REWARDS[reward].is_loss else worth})  # type: ignore[arg-type]


def _spread_layers(elastic: ElasticModel, encoded: Encoded, cache_bytes: int) -> tuple[int, ...]:
    """The layers before which to keep the dense states: as many as the memory holds, evenly spread."""
    layers = len(elastic.backbone.layers)
    size = sum(batch.embeddings.nbytes for batch in encoded.batches)
    count = min(cache_bytes // size, layers - 1)
    return tuple(round((number + 1) * layers / (count + 1)) for number in range(count))
