"""What a backbone computes, in floating point operations, from its shapes alone."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from lop.model.backbone import Backbone, Layer
from lop.model.contextual import ContextualFfn
from lop.model.elastic import ElasticFfn


def flops(backbone: Backbone, lengths: Sequence[Sequence[int]], predicted: int) -> int:
    """The operations of reading sequences: two for each product of a weight and a number, and of attention.

    As `torch.utils.flop_counter` counts transformers' own pass: attention looks at all pairs of tokens, masked or not,
    and norms, activations and rotations are left out. It is what a model that is served computes, not what
    `lop.model.backbone` does, which leaves out what no answer depends on. The vision tower is not counted.

    Args:
        backbone: its FFNs with the widths that they have now.
        lengths: of each layer, the tokens of each sequence.
        predicted: tokens that the head is applied to.
    """
    entry = 0 if backbone.entry is None else 2 * sum(lengths[0]) * backbone.entry.numel()
    layers = sum(layer_flops(layer, length) for layer, tokens in zip(backbone.layers, lengths) for length in tokens)
    return entry + layers + 2 * predicted * backbone.head.numel()


def layer_flops(layer: Layer, length: int) -> int:
    """Those of one layer for one sequence: `2·T·(weights) + 4·T²·Q·D`."""
    ffn = cast(ElasticFfn, layer.ffn)
    per_neuron = ffn.gate.shape[1] + ffn.up.shape[1] + ffn.down.shape[0]
    tensors: list[Tensor | None] = [layer.heads.qkv, layer.heads.out, layer.attention_turn, layer.ffn_turn]
    weights = sum(tensor.numel() for tensor in tensors if tensor is not None) + ffn.width * per_neuron
    weights += ffn.predictor_parameters if isinstance(ffn, ContextualFfn) else 0
    return 2 * length * weights + 4 * length**2 * layer.heads.out.shape[1]
