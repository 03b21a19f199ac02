"""FastV (Chen et al., ECCV 2024): after layer K an image keeps the tokens that are looked at most.

A token's score is the attention that it gets in layer K, the mean over heads, from the last token of the prompt; of V
tokens the `round((1 − R)·V)` best go on, with their positions, and the others are dropped (`modeling_llama.py` of
github.com/pkunlp-icler/FastV: `fast_v_attention_rank`, with the last token's row; the paper speaks of all tokens that
look). K = 2 as published, of however many layers.
"""

from typing import TYPE_CHECKING

from lop.methods.dropping import Dropping, planned

if TYPE_CHECKING:
    from torch import Tensor

    from lop.model.beyond.dropping import Plan

LAYERS = 2


def last_token(images: "Tensor", text: "Tensor") -> "Tensor":
    """The token that the answer follows decides, [S] bool, whatever the embeddings of image [V, H] and text [S, H]."""
    import torch

    decides = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    decides[-1] = True
    return decides


def best(scores: "Tensor", states: "Tensor", count: int) -> "tuple[Tensor, Tensor]":
    """The tokens [k] of highest score [V], ascending by place, with their states [k, H]; of equals the first."""
    chosen = scores.argsort(descending=True, stable=True)[:count].sort().values
    return chosen, states[chosen]


def after_two_layers(layers: int, dropped: float) -> "Plan":
    """One stage."""
    from lop.model.beyond.dropping import Plan, Stage

    return Plan((Stage(min(LAYERS, layers - 1), 1 - dropped),), last_token, best)


METHOD = Dropping("fastv", planned(after_two_layers), "FastV")
