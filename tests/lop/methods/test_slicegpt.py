"""States made narrower: by hand, exactly the same function at full width, and what it costs."""

import pytest
import torch

from lop.errors import LopError
from lop.methods.registry import RESHAPINGS
from lop.model.adapter import QwenVL
from lop.model.backbone import Backbone, Group, Heads, Layer
from lop.model.beyond.depth import parameters
from lop.model.beyond.slicing import principal_axes, sliced, sliced_parameters, widest
from lop.model.elastic import ElasticFfn
from lop.model.encoding import Encoded
from lop.search.scoring import Scoring
from tests.lop.model.test_taylor import in_dense_order

SLICEGPT = RESHAPINGS["slicegpt"]


@pytest.fixture
def backbone(tiny: QwenVL) -> Backbone:
    return in_dense_order(tiny).backbone


@torch.inference_mode()
def tails(backbone: Backbone, encoded: Encoded) -> torch.Tensor:
    return torch.cat(Scoring(backbone, encoded).all_tails())


def test_nothing_sliced_is_the_same_function(backbone: Backbone, encoded: Encoded) -> None:
    whole = sliced(backbone, principal_axes(backbone, encoded), 72)
    torch.testing.assert_close(tails(whole, encoded), tails(backbone, encoded), rtol=0, atol=5e-4)


def test_two_numbers_of_which_one_stays() -> None:
    """A layer whose states lie on one line but for noise: the line stays, as a state of one number."""
    line = torch.tensor([0.6, 0.8])
    zero = torch.zeros(2, 2)
    ffn = ElasticFfn(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]]), line[:, None], torch.arange(1))
    layer = Layer(
        attention_norm=torch.tensor([1.0, 1.0]),
        heads=Heads(torch.zeros(6, 2), torch.zeros(6), zero, size=2),
        ffn_norm=torch.tensor([2.0, 0.5]),
        ffn=ffn,
    )
    backbone = Backbone((layer,), torch.ones(2), torch.eye(2), epsilon=0.0)
    axes = [(torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64),) * 2]
    found = sliced(backbone, axes, 1)
    x = torch.outer(torch.tensor([1.0, 5.0]), line)
    rotation = torch.ones(2, 1, dtype=torch.complex64)
    assert found.entered(x)[:, 0].tolist() == pytest.approx([1.0, 5.0])
    (states,) = found.hidden(x, rotation, (Group(1, 2, 1),))
    # Normed it is √2·(0.6, 0.8), times g √2·(1.2, 0.4): gate 2·√2, up 4·√2, so the FFN says silu(2·√2)·4·√2 there.
    says = torch.nn.functional.silu(torch.tensor(2 * 2**0.5)) * 4 * 2**0.5
    torch.testing.assert_close(states, x + says * line)
    (dense,) = backbone.hidden(x, rotation, (Group(1, 2, 1),))
    torch.testing.assert_close(states, dense)


def test_axes_are_those_of_the_largest_sums_first(backbone: Backbone, encoded: Encoded) -> None:
    axes = principal_axes(backbone, encoded)
    x = torch.cat([batch.embeddings for batch in encoded.batches]).double()
    along = (x @ axes[0][0]).square().sum(0)
    assert (along.diff() <= 1e-9 * along[0]).all()
    torch.testing.assert_close(axes[5][1].T @ axes[5][1], torch.eye(72, dtype=torch.float64))


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_its_matrices_count_in_the_budget(ratio: float, backbone: Backbone, encoded: Encoded) -> None:
    asked = round(ratio * 12 * 160 * 216)
    width = widest(backbone, asked)
    found = SLICEGPT.reshape(backbone, encoded, asked, False)
    assert found.backbone.entry is not None
    assert found.backbone.entry.shape == (72, width)
    assert parameters(found.backbone) == sliced_parameters(backbone, width) == parameters(backbone) - found.removed
    assert found.removed >= asked > parameters(backbone) - sliced_parameters(backbone, width + 1)
    assert (tails(found.backbone, encoded) - tails(backbone, encoded)).abs().max() > 0.01
    with pytest.raises(LopError, match="smaller ratio"):
        SLICEGPT.reshape(backbone, encoded, parameters(backbone), False)
