"""How the small networks learn that take the place of larger ones: Adam, its rate falling to zero by a cosine."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def learn(weights: Iterable[Tensor], losses: Iterable[Tensor], *, rate: float, steps: int) -> None:
    """Changes the weights by one step down each loss.

    Args:
        losses: each computed when it is asked for, by the weights as they are then.
        rate: the first step's.
        steps: how many losses there are.
    """
    optimiser = torch.optim.Adam(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    for loss in losses:
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
