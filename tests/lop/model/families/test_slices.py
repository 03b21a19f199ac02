"""Vision towers in slices: each family's gives what it gives whole."""

from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from lop.model.families.registry import FAMILIES

PATCH = {"patch_size": 14, "in_channels": 3, "spatial_merge_size": 2}
TOWERS = {
    # Windows of 4×4 patches, but in one block.
    "qwen2_5_vl": lambda: Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VLVisionConfig(
            depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=24, window_size=56,
            fullatt_block_indexes=[1], **PATCH,
        )
    ),
    "qwen2_vl": lambda: Qwen2VisionTransformerPretrainedModel(
        Qwen2VLVisionConfig(depth=2, embed_dim=32, num_heads=2, mlp_ratio=2, hidden_size=24, **PATCH)
    ),
}  # fmt: skip


def tower_of(family: str) -> Any:
    torch.manual_seed(0)
    tower = TOWERS[family]().eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return tower


def test_every_family_has_its_tower_here() -> None:
    assert TOWERS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("most", [5, 16, 40, 100])
def test_a_tower_in_slices_is_the_whole_tower(most: int, family: str) -> None:
    tower = tower_of(family)
    grids = torch.tensor([[1, 6, 10], [1, 4, 4], [1, 2, 8]])  # Neither is whole windows.
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 14 * 14)
    rows: list[int] = []
    tower.blocks[0].mlp.register_forward_pre_hook(lambda _, x: rows.append(len(x[0])))
    with torch.inference_mode():
        expected = tower(pixels, grid_thw=grids).pooler_output
        rows.clear()
        with FAMILIES[family].sliced(tower, most):
            found = tower(pixels, grid_thw=grids).pooler_output
        assert max(rows) <= most
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(tower(pixels, grid_thw=grids).pooler_output, expected)  # Nothing of the slices stays.
