"""What a backbone computes, in floating point operations, from its shapes alone."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from lop.model.backbone import Backbone, Layer
from lop.model.beyond.contextual import ContextualFfn
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
    layers = sum(layer_flops(layer, length) for layer, tokens in zip(backbone.layers, lengths) for length in tokens)
    return layers + ends_flops(backbone, sum(lengths[0]), predicted)


def ends_flops(backbone: Backbone, read: int, predicted: int) -> int:
    """Those before the first layer, for so many tokens, and after the last, for so many that are predicted."""
    entry = 0 if backbone.entry is None else read * backbone.entry.numel()
    return 2 * (entry + predicted * backbone.head.numel())


def layer_flops(layer: Layer, length: int) -> int:
    """Those of one layer for one sequence: `2·T·(weights) + 4·T²·Q·D`."""
    return 2 * length * layer_weights(layer) + 4 * length**2 * layer.heads.out.shape[1]


def layer_weights(layer: Layer) -> int:
    """How many weights each token is multiplied by."""
    heads, ffn = layer.heads, layer.ffn
    predictor = ffn.predictor_parameters if isinstance(ffn, ContextualFfn) else 0
    return heads.qkv.numel() + heads.out.numel() + _turns(layer) + ffn_weights(layer) + predictor


def ffn_weights(layer: Layer, neurons: int | None = None) -> int:
    """Those of some of its FFN's neurons, or of all that it keeps."""
    ffn = cast(ElasticFfn, layer.ffn)
    each = ffn.gate.shape[1] + ffn.up.shape[1] + ffn.down.shape[0]
    return (ffn.width if neurons is None else neurons) * each


def heads_weights(layer: Layer, active: Tensor) -> int:
    """Those that a token is multiplied by of which some heads [Q] bool ask, speak and are looked at.

    Keys and values are there once for a group, as long as one of its heads is active.
    """
    heads = layer.heads
    groups = int(active.view(-1, heads.shared).any(1).sum()) if len(active) else 0
    asking, speaking = heads.qkv.shape[1], heads.out.shape[0]
    return heads.size * (int(active.sum()) * (asking + speaking) + 2 * groups * asking)


def visual_layer_flops(layer: Layer, text: int, near: int, images: int, active: Tensor, neurons: int) -> int:
    """Those of one layer for one sequence, of whose image it computes less.

    Args:
        text: how many other tokens there are.
        near: pairs of the image's tokens that look at each other.
        images: the image's tokens.
        active: [Q] bool, the heads that take part in what is computed for these.
        neurons: of the FFN, that they use.
    """
    count = int(active.sum())
    pairs = count * ((text + images) ** 2 - images**2 + near) + (len(active) - count) * text**2
    each = heads_weights(layer, active) + _turns(layer) + ffn_weights(layer, neurons)
    return 2 * (text * layer_weights(layer) + images * each) + 4 * pairs * layer.heads.size


def _turns(layer: Layer) -> int:
    return sum(turn.numel() for turn in (layer.attention_turn, layer.ffn_turn) if turn is not None)
