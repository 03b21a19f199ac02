"""SparseVLM (Zhang et al., ICML 2025): text that has to do with the image rates its tokens; the rest is merged.

Raters are the text tokens after the image with `r_i > mean(r)`, `r = mean_v softmax(E_v · E_tᵀ)` over the embeddings of
visual tokens v and text tokens t. In the layer before a stage a visual token's score is the attention that it gets from
the raters, mean over heads and raters; those of the highest scores stay. Of the D others the `⌊0.3·D⌋ + 1` best rated
are recycled: grouped by density peaks into `⌊n/10⌋ + 1` clusters, whose mean states go on as one token each, here at
the place of the cluster's centre (`score.py` and `utils.py`, `cluster_and_merge`, of github.com/Gumpest/SparseVLMs).

How many are left: the paper's rule deletes `λ·(V − rank(P))` of V tokens, P being the raters' attention to them. The
published code does not (there `rank = 0`); it keeps 300, 200 and 110 of 576 tokens after layers 2, 6 and 15 of 32. So
here: dropped shares in that proportion, at these depths, scaled so that all layers together see as many tokens as with
`fastv`. The rank would tell nothing where an image is 4 tokens and a question ten: it is full. What is merged counts
among the tokens that are left.
"""

from typing import TYPE_CHECKING

from lop.methods.dropping import Dropping, planned
from lop.methods.fastv import LAYERS, best

if TYPE_CHECKING:
    from torch import Tensor

    from lop.model.beyond.dropping import Plan

# As published: after which share of the layers, which share of the tokens is gone.
_DEPTHS = (2 / 32, 6 / 32, 15 / 32)
_DROPPED = (1 - 300 / 576, 1 - 200 / 576, 1 - 110 / 576)
_RECYCLED = 0.3
_PER_CLUSTER = 10


def relevant(images: "Tensor", text: "Tensor") -> "Tensor":
    """The text tokens [S] bool that have more to do with the image than the mean, by embeddings [V, H] and [S, H]."""
    relevance = (images.float() @ text.float().T).softmax(1).mean(0)
    found = relevance > relevance.mean()
    return found if found.any() else ~found  # All alike.


def kept_and_merged(dropped: int) -> int:
    """The clusters that become tokens again of so many that are dropped."""
    return (int(_RECYCLED * dropped) + 1) // _PER_CLUSTER + 1 if dropped else 0


def recycle(scores: "Tensor", states: "Tensor", count: int) -> "tuple[Tensor, Tensor]":
    """The best rated tokens and the merged ones, `count` together, ascending by place.

    With one token to be left nothing is merged.
    """
    import torch

    total = len(scores)
    whole = next((k for k in range(count, 0, -1) if k + kept_and_merged(total - k) <= count), count)
    chosen, left = best(scores, states, whole)
    if whole == count:
        return chosen, left
    rest = scores.clone()
    rest[chosen] = -torch.inf
    recycled = best(rest, states, int(_RECYCLED * (total - whole)) + 1)[0]
    centres, merged = clustered(states[recycled], count - whole)
    places = torch.cat([chosen, recycled[centres]])
    order = places.argsort()
    return places[order], torch.cat([left, merged])[order]


def clustered(states: "Tensor", clusters: int) -> "tuple[Tensor, Tensor]":
    """Clusters by density peaks (DPC-kNN): which of the states [n, H] are centres [c], and their means [c, H]."""
    import torch

    distances = torch.cdist(states.float(), states.float()) / states.shape[1] ** 0.5
    near = distances.topk(min(clusters, len(states)), largest=False).values
    density = (-near.square().mean(1)).exp()
    place = torch.arange(len(states), device=states.device)
    # Of equals the first, where the published code adds noise.
    denser = (density[None] > density[:, None]) | ((density[None] == density[:, None]) & (place[None] < place[:, None]))
    apart = torch.where(denser, distances, distances.max()).min(1).values
    centres = (apart * density).argsort(descending=True, stable=True)[:clusters]
    owner = distances[:, centres].argmin(1)
    owner[centres] = torch.arange(len(centres), device=owner.device)
    sums = torch.zeros(len(centres), states.shape[1], dtype=torch.float32, device=states.device)
    sums.index_add_(0, owner, states.float())
    return centres, (sums / owner.bincount(minlength=len(centres))[:, None]).to(states.dtype)


def in_three_stages(layers: int, dropped: float) -> "Plan":
    """The published proportions, scaled; a share that would be more than all leaves its excess to the other stages."""
    from lop.model.beyond.dropping import Plan, Stage

    depths = [min(max(round(depth * layers), 1), layers - 1) for depth in _DEPTHS]
    spans = [after - before for before, after in zip(depths, [*depths[1:], layers])]
    wanted = dropped * (layers - min(LAYERS, layers - 1))
    low, high = 0.0, 1 / min(_DROPPED)
    for _ in range(50):
        scale = (low + high) / 2
        gone = sum(span * min(scale * share, 1) for span, share in zip(spans, _DROPPED))
        low, high = (scale, high) if gone < wanted else (low, scale)
    stages = [Stage(depth, 1 - min(high * share, 1)) for depth, share in zip(depths, _DROPPED)]
    return Plan(tuple(stage for stage, span in zip(stages, spans) if span), relevant, recycle)


METHOD = Dropping("sparsevlm", planned(in_three_stages), "SparseVLM")
