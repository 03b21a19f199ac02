"""What rounding leaves of a matrix."""

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor

from lop.model.rounding import Rounding

# Older ones do not unpack when they load.
pytest.importorskip("transformers", minversion="5.24")


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(48, 128, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.fixture
def inputs() -> torch.Tensor:
    """Correlated, as activations are."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(500, 128, generator=generator) @ torch.randn(128, 128, generator=generator)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_the_grid_that_loses_least_is_taken(bits: int, weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> torch.Tensor:
        return (Rounding(bits, 32).rounded(weight) - weight).float().unflatten(1, (-1, 32))

    chosen = lost()
    monkeypatch.setattr("lop.model.rounding._REACHES", (1.0,))
    whole, groups = lost(), weight.float().unflatten(1, (-1, 32))
    step = (groups.amax(2) - groups.amin(2)) / (2**bits - 1)
    # A zero point is a whole number, so an end of the grid may be half a step off; bfloat16 rounds by 2⁻⁹.
    assert (whole.abs().amax(2) <= 1.01 * step + groups.abs().amax(2) * 2**-8).all()
    assert chosen.square().sum() <= whole.square().sum()
    assert bits > 4 or chosen.square().sum() < 0.99 * whole.square().sum()


def test_with_a_gram_matrix_outputs_are_nearer_and_the_grid_is_kept(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    rounding = Rounding(4, 32)
    gram = inputs.T @ inputs
    packed = rounding.pack(weight, gram)
    again = PackedQuantizationCompressor.decompress(packed, rounding._scheme)["weight"]
    assert torch.equal(rounding.unpack(packed), again)

    def lost(rounded: torch.Tensor) -> float:
        return float((inputs @ (rounded - weight).float().T).square().mean())

    assert lost(again) < 0.6 * lost(rounding.rounded(weight))
    assert packed["weight_packed"].shape == (48, 16)


def test_silent_inputs_and_zeros_round_to_numbers() -> None:
    weight = torch.zeros(48, 64, dtype=torch.bfloat16)
    weight[:, :32] = 1
    for gram in (None, torch.zeros(64, 64)):
        assert torch.equal(Rounding(4, 32).rounded(weight, gram), weight)
