"""How far a student is from its teacher: in the distributions of the next token, and in states between layers."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Likeliest:
    """Distributions over a vocabulary of V, of which the k likeliest tokens are known one by one.

    Attributes:
        log_probabilities: [N, k] float32.
        tokens: [N, k] int64.
        rest: [N] float32, the logarithm of what all others have together; −∞ if there are none.
    """

    log_probabilities: Tensor
    tokens: Tensor
    rest: Tensor


def likeliest(logits: Tensor, k: int) -> Likeliest:
    """What logits [N, V] say, with the `k` likeliest tokens (or all V) one by one."""
    log_p = logits.float().log_softmax(1)
    values, tokens = log_p.topk(min(k, log_p.shape[1]), dim=1)
    return Likeliest(values, tokens, _rest(log_p, tokens))


def divergence(teacher: Likeliest, logits: Tensor) -> Tensor:
    """[N], KL(teacher ‖ student) in nats for the student's logits [N, V].

    All tokens but the teacher's k likeliest are one event, "another": the sum is a lower bound of the KL over the whole
    vocabulary (what is in the bucket is not told apart), and equals it for k = V.
    """
    log_q = logits.float().log_softmax(1)
    log_p = teacher.log_probabilities
    known = (log_p.exp() * (log_p - log_q.gather(1, teacher.tokens))).sum(1)
    if teacher.tokens.shape[1] == logits.shape[1]:
        return known
    return known + teacher.rest.exp() * (teacher.rest - _rest(log_q, teacher.tokens))


def distance(teacher: Tensor, states: Tensor) -> Tensor:
    """[...], `‖s − t‖² / ‖t‖²` of states [..., H]: the same for every layer, however large its states are."""
    teacher = teacher.float()
    return (states.float() - teacher).square().sum(-1) / teacher.square().sum(-1)


def _rest(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """[N], the logarithm of the sum of [N, V] without `tokens` [N, k]; exact, however little that is."""
    return log_probabilities.scatter(1, tokens, -torch.inf).logsumexp(1)
