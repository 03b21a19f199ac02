"""Minitron's aggregation: the L2 norm over sequences of means over tokens."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lop.model.adapter import QwenVL
from lop.model.encoding import Batch, encode
from lop.model.samples import SampleSets
from lop.model.sequences import sequence_squares
from lop.model.walk import Walk
from tests.lop.model.test_taylor import in_dense_order


def test_each_sequence_counts_once_however_it_is_cut(
    tiny: QwenVL, samples: SampleSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = samples.calibration[:7]
    backbone = in_dense_order(tiny).backbone
    # By itself a sequence is a batch, and what is seen of it is all of its tokens.
    expected = torch.zeros(len(backbone.layers), 160, dtype=torch.float64)
    for sample in few:
        walk = Walk(backbone, encode(tiny, [sample], batch_tokens=1))
        seen: list[Tensor] = []

        def see(hidden: Tensor, batch: Batch, tokens: slice, seen: list[Tensor] = seen) -> None:
            assert tokens == slice(0, len(batch))
            seen.append(hidden)

        for _ in backbone.layers:
            walk.step(see)
        expected += torch.stack([hidden.double().abs().mean(0).square() for hidden in seen])
    monkeypatch.setattr("lop.model.walk.ROWS", 11)
    encoded = encode(tiny, few, batch_tokens=100)
    assert 1 < len(encoded.batches) < len(few)
    np.testing.assert_allclose(sequence_squares(backbone, encoded), expected.numpy(), rtol=1e-4)
