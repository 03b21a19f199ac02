"""Ensembles of small networks, which are computed and trained at once."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

SIZE, WIDTH = 5, 16
# The deviation of the noise on inputs whose own is 1, which is against learning by heart.
BLUR = 0.2
_EPOCHS, _RATE = 200, 5e-3


class Ensemble(nn.Module):
    """Networks of the same linear layers: all weights have a first dimension for the members.

    The layer `out` starts at zero: untrained, they change nothing.

    Args:
        sizes: of each layer by its name, how many numbers it takes and how many it makes.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.weights = nn.ParameterDict()
        for name, (rows, columns) in sizes.items():
            scale = 0.0 if name == "out" else rows**-0.5
            self.weights[f"{name}/weight"] = nn.Parameter(torch.randn(SIZE, columns, rows) * scale)
            self.weights[f"{name}/bias"] = nn.Parameter(torch.zeros(SIZE, 1, columns))

    def arrays(self) -> dict[str, np.ndarray]:
        """The weights, `name.weight` [e, columns, rows] and `name.bias` [e, columns] of each layer."""
        found = {name.replace("/", "."): weight.detach().double().numpy() for name, weight in self.weights.items()}
        return {name: array[:, 0] if name.endswith("bias") else array for name, array in found.items()}

    def learn(self, loss: Callable[[], Tensor], decay: float) -> None:
        """Trains them all.

        Args:
            loss: their losses, added up; asked for anew at each step.
            decay: of the weights.
        """
        optimiser = torch.optim.AdamW(self.parameters(), lr=_RATE, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _EPOCHS)
        for _ in range(_EPOCHS):
            found = loss()
            optimiser.zero_grad()
            found.backward()
            optimiser.step()
            schedule.step()
