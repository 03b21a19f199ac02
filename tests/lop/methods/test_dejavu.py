"""Other neurons for each token: which a predictor finds, and what that computes."""

import torch
from torch.nn import functional as F

from lop.methods.registry import CONTEXTUAL
from lop.model.adapter import QwenVL
from lop.model.beyond.contextual import ContextualFfn, among_most, contextual
from lop.model.beyond.flops import flops
from lop.model.elastic import ElasticFfn
from lop.model.encoding import Encoded
from lop.search.scoring import Scoring
from tests.lop.model.test_taylor import in_dense_order


def test_a_token_uses_the_neurons_that_its_predictor_says() -> None:
    ffn = ElasticFfn(torch.eye(2), torch.ones(2, 2), torch.eye(2), torch.arange(2))
    # The predictor: the first number speaks for the second neuron, the second for the first.
    found = ContextualFfn(ffn, torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), 1)
    x = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    expected = F.silu(x) * x.sum(1, keepdim=True) * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(found(x), expected)
    assert found.predictor_parameters == 8
    assert among_most(torch.tensor([0.1, 0.5, 0.3]), 2).tolist() == [0.0, 1.0, 1.0]


def test_predictors_find_the_neurons_that_tokens_need(tiny: QwenVL, encoded: Encoded) -> None:
    elastic = in_dense_order(tiny)
    dense = torch.cat(Scoring(elastic.backbone, encoded).all_tails())

    def lost(epochs: int) -> float:
        found = contextual(elastic.backbone, encoded, (80,) * 12, 18, epochs=epochs)
        return float((torch.cat(Scoring(found, encoded).all_tails()) - dense).square().mean())

    assert lost(8) < 0.5 * lost(0)
    whole = CONTEXTUAL["dejavu"].make(elastic.backbone, encoded, (160,) * 12)
    torch.testing.assert_close(torch.cat(Scoring(whole, encoded).all_tails()), dense, rtol=0, atol=2e-4)
    # What the predictors compute counts.
    lengths = [[10]] * 12
    more = flops(whole, lengths, 1) - flops(elastic.backbone, lengths, 1)
    assert more == 12 * 2 * 10 * 18 * (72 + 160)
