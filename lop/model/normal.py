"""Ridge least squares for the last matrix of a part, from sums over tokens."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lop.model.backbone import ROWS, Backbone, Layer
from lop.model.elastic import ElasticFfn
from lop.model.encoding import Batch
from lop.model.repair import ridged_factor


class NormalEquations:
    """Sums over tokens, and the weights W + Δ that follow from them; see `lop.checkpoint.recovery.refit`.

    Args:
        weight: [H, F], of all units.
        width: k, of those kept.
    """

    def __init__(self, weight: Tensor, width: int) -> None:
        self._weight, self._width = weight, width
        self._gram = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
        self._change = torch.zeros(len(weight), width, dtype=torch.float64, device=weight.device)

    @property
    def gram(self) -> Tensor:
        """G [k, k], float64, until the weights are solved for."""
        return self._gram

    def add(self, backbone: Backbone, layer: Layer, residual: Tensor, output: Tensor, catch_up: float) -> None:
        """Adds tokens' r and o [N, H]; the layer's FFN must have all its neurons."""
        ffn = cast(ElasticFfn, layer.ffn)
        for x, wanted in zip(residual.split(ROWS), output.split(ROWS)):
            self.add_tokens(ffn.hidden(backbone.ffn_input(layer, x)), x, wanted, catch_up)

    def add_heads(
        self, backbone: Backbone, layer: Layer, batch: Batch, residual: Tensor, output: Tensor, catch_up: float
    ) -> None:
        """Adds a batch's r and o [N, H]; the layer's attention must have all its groups."""
        said = backbone.heads_output(layer, residual, batch.rotation.to(residual.device), batch.groups)
        for part in zip(said.split(ROWS), residual.split(ROWS), output.split(ROWS)):
            self.add_tokens(*part, catch_up)

    def add_tokens(self, hidden: Tensor, residual: Tensor, wanted: Tensor, catch_up: float = 1.0) -> None:
        """Adds tokens' inputs of all units [N, F], and r and o [N, H]."""
        residual, wanted = residual.float(), wanted.float()
        kept, pruned = hidden.tensor_split([self._width], dim=1)
        lost = F.linear(pruned, self._weight[:, self._width :]).float()
        whole = F.linear(kept, self._weight[:, : self._width]).float() + lost
        missing = lost + catch_up * (wanted - residual - whole)  # t − W·h
        scale = wanted.square().mean(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        # Products in float32, which every GPU is fast at; sums over batches in float64.
        kept = kept.float() * scale
        self._gram += kept.T @ kept
        self._change += (missing * scale).T @ kept

    def solve(self, ridge: float) -> Tensor:
        """The weights [H, k], in the dense weights' dtype; changes the sums."""
        change = torch.cholesky_solve(self._change.T, ridged_factor(self._gram, ridge)).T
        return (self._weight[:, : self._width].double() + change).to(self._weight.dtype)
