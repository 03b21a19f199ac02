"""Attention as transformers builds it, with fewer groups of heads than it was built with."""

from typing import Any

from torch import Tensor
from torch.nn import Linear, Parameter


def keep_groups(attention: Any, groups: int) -> None:
    """Leaves an attention its first groups: key and value heads with their query heads, over the same weights."""
    heads = {"q_proj": groups * attention.num_key_value_groups, "k_proj": groups, "v_proj": groups}
    for name, count in heads.items():
        linear, rows = getattr(attention, name), count * attention.head_dim
        _put(linear, linear.weight[:rows])
        linear.bias = Parameter(linear.bias[:rows], requires_grad=False)
    columns = heads["q_proj"] * attention.head_dim
    # Rows are together as they are; columns are put together, as in a checkpoint.
    _put(attention.o_proj, attention.o_proj.weight[:, :columns].contiguous())
    attention.num_heads, attention.num_key_value_heads = heads["q_proj"], groups


def _put(linear: Linear, weight: Tensor) -> None:
    linear.weight = Parameter(weight, requires_grad=False)
    linear.out_features, linear.in_features = weight.shape
