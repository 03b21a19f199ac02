"""LLM-Pruner (Ma et al., NeurIPS 2023): neurons of least first-order effect on the loss; outer layers stay whole.

A neuron's rows of `gate_proj` and `up_proj` and its column of `down_proj` are one group of coupled weights (its
discovery stage). With the gradient of the loss on all calibration samples together, its score is (its estimation stage,
and `LLMPruner/pruner/hf_llama_pruner.py` of github.com/horseee/LLM-Pruner: `TaylorImportance`, grouped by `sum`)

    llm-pruner          Σ_θ |θ·∂L/∂θ|, over all weights θ of the group       (`--taylor param_first`)
    llm-pruner-vector   Σ |Σ_θ θ·∂L/∂θ|, the inner sum over a row or column  (`--taylor vectorize`)

As published, layers 4 to 29 of 32 are pruned (`scripts/llama_prune.sh`: `--block_mlp_layer_start 4
--block_mlp_layer_end 30`), all by the same ratio; of L layers these are the first L/8 and the last L/16 that stay
whole. Published samples: ten pieces of 64 tokens, and the mean loss of their tokens; here all calibration samples, and
the sum over answers' tokens, which ranks alike. Not covered: the terms of second order, and fine-tuning with LoRA
afterwards.

Those two know FFNs alone. `llm-pruner-heads` and `llm-pruner-heads-vector` prune attention, too, as published
(`--block_attention_layer_start 4 --block_attention_layer_end 30`): of the same layers by the same ratio. A group of
coupled weights is there a key/value head with the query heads that share it: its rows of `q_proj`, `k_proj` and
`v_proj` and its columns of `o_proj`, scored by the same sums (`consecutive_groups`, the heads' size, in the published
code, where each head has its own keys). The biases that these models have beside those rows count with neither.
"""

from typing import TYPE_CHECKING

import numpy as np

from lop.methods.method import Method, Need, Side, reading
from lop.space.allocation import Allocation, Space, project

if TYPE_CHECKING:
    from lop.model.statistics import NeuronStatistics

# Shares of the layers that stay whole.
_FIRST, _LAST = 4 / 32, 2 / 32


def middle_layers(_: "NeuronStatistics", space: Space, budget: int) -> Allocation:
    """All layers but the first and last are pruned by one ratio, `R·L / (layers pruned)`.

    Where that is more than `max_ratio`, the others give what is missing (the projection onto the budget).
    """
    first, last = round(_FIRST * space.layers), round(_LAST * space.layers)
    pruned = np.zeros(space.layers)
    pruned[first : space.layers - last] = 1.0
    ratios = space.ratio(budget) * space.layers / pruned.sum() * pruned
    return project(np.tile(ratios, len(space.parts)), space, budget)


def _method(name: str, importance: str, label: str, *, heads: bool = False) -> Method:
    return Method(
        name,
        Side.BASELINE,
        reading(middle_layers, is_of_axes=heads),
        needs=frozenset({Need.ACTIVATIONS, Need.GRADIENTS, *([Need.HEAD_GRADIENTS] if heads else [])}),
        importance=importance,
        start=middle_layers,
        is_of_axes=heads,
        has_profile=True,
        label=label,
    )


METHOD = _method("llm-pruner", "taylor", "LLM-Pruner")
VECTOR = _method("llm-pruner-vector", "taylor-vector", "LLM-Pruner (vector)")
HEADS = _method("llm-pruner-heads", "taylor-heads", "LLM-Pruner (heads, too)", heads=True)
HEADS_VECTOR = _method("llm-pruner-heads-vector", "taylor-heads-vector", "LLM-Pruner (heads, too; vector)", heads=True)
