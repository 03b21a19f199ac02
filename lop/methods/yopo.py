"""YOPO (Zhang et al., "Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See", 2024).

No token is chosen: what is computed for images' tokens is pruned once for all inputs. As published
(`modeling_llama_prune.py` and `gen_mask_llava.py` of github.com/ZhangAIPI/YOPO_MLLM_Pruning, `finetune_yopo.sh`):

- images' tokens look at those in a window of 5 by 5 around them, of each other;
- heads are dormant that look least at images, by the weights of attention on their tokens over those on all others,
  by a threshold for all layers and a majority of calibration samples; of the first two layers none is. No token looks
  at images with them, and they say nothing of images' tokens;
- of each FFN images' tokens use a part, the first neurons;
- after half of the layers nobody looks at images' tokens any more, so nothing is computed for them.

Three quarters of the heads and half of the neurons are what 25% of the visual operations go with there.

Ours, as nothing is trained here: neurons are those that the model has first, which LOP has put in order of importance,
where the published models learn to do with any; tokens look at no neighbour that stands after them, which only training
makes good; and what dormant heads do not look at is left out before weights add up to one, as in the published code for
Qwen2-VL what late layers do not look at (its heads' weights are set to zero after it, which computes all that is not
used). A head's ratio is the median over samples, which is the majority's at any threshold. And how much is pruned: with
a share d of the layers goes (1 + d)/2 of these layers' heads and d of their neurons, through the published point at 1/2
and through the whole model at 1; d is the largest so that images' tokens are multiplied by no more weights than with
`fastv`, and the neurons make up for what is missing to as many.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

from lop.methods.dropping import Dropping
from lop.methods.fastv import LAYERS
from lop.methods.method import Need

if TYPE_CHECKING:
    from torch import Tensor

    from lop.model.backbone import Backbone
    from lop.model.beyond.dropping import Reading
    from lop.model.beyond.visual import Sights
    from lop.model.elastic import ElasticFfn
    from lop.model.encoding import Encoded

_RADIUS = 2


def pruned_once(backbone: "Backbone", calibration: "Callable[[], Encoded]", dropped: float) -> "Reading":
    """Heads are rated on the calibration samples, by the backbone as it is."""
    from lop.model.beyond.visual import seen_tails, visual_ratios

    return partial(seen_tails, sights=sights(backbone, visual_ratios(backbone, calibration()), dropped))


def sights(backbone: "Backbone", ratios: "Sequence[Tensor]", dropped: float) -> "Sights":
    """What is left of the computing for images' tokens, as much as `fastv` leaves.

    Args:
        ratios: of each layer's heads [Q], how much they look at images.
    """
    import torch

    from lop.model.beyond.flops import ffn_weights, heads_weights, layer_weights
    from lop.model.beyond.visual import Sight, Sights

    layers = backbone.layers
    whole = [layer_weights(layer) for layer in layers]
    first = min(LAYERS, len(layers) - 1)
    wanted = sum(whole[:first]) + (1 - dropped) * sum(whole[first:])
    ffns = [ffn_weights(layer) for layer in layers]
    for count in range(len(layers), 0, -1):
        share = count / len(layers)
        kept = active(ratios[:count], (1 + share) / 2)
        spent = sum(
            weights - ffn - heads_weights(layer, torch.ones_like(heads)) + heads_weights(layer, heads)
            for weights, ffn, layer, heads in zip(whole, ffns, layers, kept)
        )
        if spent + share * sum(ffns[:count]) <= wanted:
            break
    part = min(max((wanted - spent) / sum(ffns[:count]), 0), 1)
    widths = [cast("ElasticFfn", layer.ffn).width for layer in layers[:count]]
    return Sights(tuple(Sight(heads, int(part * width)) for heads, width in zip(kept, widths)), _RADIUS)


def active(ratios: "Sequence[Tensor]", share: float) -> "list[Tensor]":
    """Which heads [Q] bool of each layer are among the share that looks most at images; all of the first layers are."""
    import torch

    rated = torch.cat([torch.full_like(mine, torch.inf) if at < LAYERS else mine for at, mine in enumerate(ratios)])
    count = max(round(share * len(rated)), sum(len(mine) for mine in ratios[:LAYERS]))
    kept = torch.zeros_like(rated, dtype=torch.bool)
    kept[rated.argsort(descending=True, stable=True)[:count]] = True
    return list(kept.split([len(mine) for mine in ratios]))


METHOD = Dropping("yopo", pruned_once, "YOPO", frozenset({Need.ATTENTION}))
