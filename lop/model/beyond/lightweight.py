"""One decoder layer trained to do what several did: LLM-Streamline's lightweight network."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lop.model.backbone import Backbone, Heads, Layer
from lop.model.beyond.depth import led
from lop.model.beyond.learning import learn
from lop.model.elastic import ElasticFfn
from lop.model.encoding import Batch, Encoded

# Chosen on the reward samples of `tiny`, where twice the steps gain little more; wider layers take smaller steps.
_STEPS = 800
_RATE = 0.025  # Over √H.
# A layer's own tensors that are trained, beside those of its FFN.
_NORMS = ("attention_norm", "ffn_norm")
_HEADS = ("qkv", "qkv_bias", "out")


def fitted_layer(
    backbone: Backbone,
    encoded: Encoded,
    first: int,
    span: int,
    *,
    steps: int = _STEPS,
    rate: float = _RATE,
    seed: int = 0,
) -> Layer:
    """A layer that takes the place of `span` layers from `first` on, and starts as the first of these.

    Trained in float32 on the mean squared difference to the dense model's states after those layers.

    Memory: on the host, two states for each token in float32; on the device, one batch's activations.

    Args:
        backbone: dense, its layers with an `ElasticFfn` each.
        steps: of a batch each, in an order drawn by `seed`.
        rate: the first step's, over √H.
    """
    pairs = [_pair(backbone, batch, first, span) for batch in encoded.batches]
    layer = backbone.layers[first]
    ffn = cast(ElasticFfn, layer.ffn)
    dense = {
        **{name: getattr(layer, name) for name in _NORMS},
        **{name: getattr(layer.heads, name) for name in _HEADS},
        "gate": ffn.gate,
        "up": ffn.up,
        "down": ffn.down,
    }
    weights = {name: value.detach().float().clone().requires_grad_() for name, value in dense.items()}
    exact = replace(backbone, norm=backbone.norm.float(), layers=(layer,))
    draw = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(pairs), generator=draw) for _ in range(math.ceil(steps / len(pairs)))]

    def losses() -> Iterator[Tensor]:
        for index in torch.cat(rounds)[:steps].tolist():
            batch, before, after = pairs[index]
            yield F.mse_loss(_run(exact, weights, batch, before), after.to(exact.norm.device))

    learn(weights.values(), losses(), rate=rate / math.sqrt(len(backbone.norm)), steps=steps)
    found = {name: value.detach().to(dense[name].dtype) for name, value in weights.items()}
    ffn = ElasticFfn(found["gate"], found["up"], found["down"], ffn.order)
    return _layer(found, layer.heads.size, ffn)


def _layer(weights: Mapping[str, Tensor], size: int, ffn: nn.Module) -> Layer:
    """The layer of some weights, with heads of that size."""
    heads = Heads(size=size, **{name: weights[name] for name in _HEADS})
    return Layer(heads=heads, ffn=ffn, **{name: weights[name] for name in _NORMS})


@torch.no_grad()
def _pair(backbone: Backbone, batch: Batch, first: int, span: int) -> tuple[Batch, Tensor, Tensor]:
    """The batch with the states before and after the layers that are replaced."""
    batch = batch.copied(torch.device("cpu"))
    before = led(backbone, batch, batch.embeddings, 0, first)
    return batch, before.float(), led(backbone, batch, before, first, first + span).float()


def _run(backbone: Backbone, weights: Mapping[str, Tensor], batch: Batch, x: Tensor) -> Tensor:
    """The states [N, H] after the layer, for those before it in host memory."""
    device = backbone.norm.device
    layer = _layer(weights, backbone.layers[0].heads.size, nn.Identity())
    x = backbone.attend(layer, x.to(device), batch.rotation.to(device), batch.groups)
    normed = backbone.ffn_input(layer, x)
    return x + F.linear(F.silu(F.linear(normed, weights["gate"])) * F.linear(normed, weights["up"]), weights["down"])
