"""How far a student is from its teacher: in the distributions of the next token, and in states between layers."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

# Tokens whose logits are in memory together.
_LOGITS = 1024


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
    return Likeliest(values, tokens, log_p.scatter(1, tokens, -torch.inf).logsumexp(1))


def divergence(teacher: Likeliest, states: Tensor, head: Tensor) -> Tensor:
    """[N] float32, KL(teacher ‖ student) in nats where the student's logits are `states·headᵀ`.

    All tokens but the teacher's k likeliest are one event, "another": the sum is a lower bound of the KL over the whole
    vocabulary (what is in the bucket is not told apart), and equals it for k = V.

    The gradient goes to the states alone, and is computed along with the values: logits are far more than all else that
    is in memory, so there are never more than those of 1,024 places, and they are made once.

    Args:
        states: [N, H], normed.
        head: [V, H].
    """
    return cast(Tensor, _Divergence.apply(states, head, *vars(teacher).values()))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, *teacher: Tensor) -> Tensor:
        wants = ctx.needs_input_grad[0]
        found, gradients = [], []
        for rows, *told in zip(states.split(_LOGITS), *(part.split(_LOGITS) for part in teacher)):
            values, slope = _of_logits(Likeliest(*told), F.linear(rows, head).float(), wants)
            found.append(values)
            if wants:
                gradients.append(slope.to(head.dtype) @ head)
        if wants:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return ((above[0][:, None] * gradient).to(gradient.dtype), None, None, None, None)


def _of_logits(teacher: Likeliest, z: Tensor, wants_slope: bool) -> tuple[Tensor, Tensor]:
    """The divergence [N] for the student's logits z [N, V], and if wanted its derivative by them, in their memory.

    What all others have together is summed without the k, so that it is exact, however little it is.
    """
    p, p_rest = teacher.log_probabilities.exp(), teacher.rest.exp()
    known = z.gather(1, teacher.tokens)
    z.scatter_(1, teacher.tokens, -torch.inf)
    highest = z.amax(1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)  # Where nothing is left it is −∞.
    total = z.sub_(highest).exp_().sum(1, keepdim=True)
    rest = (total.log() + highest)[:, 0]
    whole = torch.logaddexp(rest, known.logsumexp(1))
    log_q, log_q_rest = known - whole[:, None], rest - whole
    values = (p * (teacher.log_probabilities - log_q)).sum(1)
    values = values + torch.where(p_rest > 0, p_rest * (teacher.rest - log_q_rest), 0)
    if wants_slope:
        z.mul_(((log_q_rest.exp() - p_rest) / total[:, 0])[:, None]).scatter_(1, teacher.tokens, log_q.exp() - p)
    return values, z


def distance(teacher: Tensor, states: Tensor) -> Tensor:
    """[...], `‖s − t‖² / ‖t‖²` of states [..., H]: the same for every layer, however large its states are."""
    teacher = teacher.float()
    return (states.float() - teacher).square().sum(-1) / teacher.square().sum(-1)
