"""The language backbone as plain tensors, and one forward pass that computes only what an answer depends on."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right


def _varlen_attention() -> Callable[..., Tensor] | None:
    """PyTorch's causal attention over sequences laid end to end; None before it had windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    if "window_size" not in takes:
        return None
    # At first it took fewer key heads than query heads unasked.
    asked = {"enable_gqa": True} if "enable_gqa" in takes else {}
    return partial(cast(Callable[..., Tensor], varlen_attn), window_size=(-1, 0), **asked)


_VARLEN = _varlen_attention()
# Is shown what a layer's heads say of N tokens, [N, Q·D].
SeeHeads = Callable[[Tensor], None]
# Tokens that an FFN sees at once: a photograph alone can be 15,000, each with 18,944 neurons in a 7B.
ROWS = 4096


@dataclass(frozen=True)
class Group:
    """`count` sequences of `length` tokens each, of which the last `tail` predict answers."""

    count: int
    length: int
    tail: int


class Heads:
    """A layer's attention heads, of which it keeps its first `width` groups: a key head with Q/K query heads.

    The rows of `qkv` are the queries of all heads, their keys and their values. Within each head of queries and keys
    the two halves that rotate together stand next to each other (0, D/2, 1, D/2 + 1, …), which changes no product of
    query and key, and makes the rotation one multiplication of complex numbers.

    Args:
        qkv: [(Q + 2·K)·D, H] for Q query heads and K key heads of size D.
        qkv_bias: [(Q + 2·K)·D].
        out: [H, Q·D].
        size: D.

    Attributes:
        groups: K.
        width: groups kept.
        qkv, qkv_bias, out: of these alone; those of pruned layers are copies, but for `out`.
        order: [K], the groups in the order in which they stand, in the dense model's numbering.
    """

    def __init__(self, qkv: Tensor, qkv_bias: Tensor, out: Tensor, size: int) -> None:
        self.size, self.queries = size, out.shape[1] // size
        self.groups = self.width = (len(qkv) // size - self.queries) // 2
        self.shared = self.queries // max(self.groups, 1)  # A pruned checkpoint's layer may have none.
        self.qkv, self.qkv_bias, self.out = qkv, qkv_bias, out
        self._dense = qkv, qkv_bias, out
        self.order = torch.arange(self.groups)

    @property
    def whole(self) -> Tensor:
        """`out` of all groups, [H, Q·D]."""
        return self._dense[2]

    @property
    def columns(self) -> int:
        """How many of the columns of `whole` are kept."""
        return self.width * self.shared * self.size

    def sort(self, order: Tensor) -> None:
        """Permutes the groups so that `order`, in the dense model's numbering, comes first to last; keeps all."""
        move = torch.argsort(self.order)[order]
        qkv, bias, out = self._dense
        rows = self._rows(move).to(out.device)
        # Into tensors of its own: the network's `o_proj` goes with projections that nobody permutes.
        self._dense = qkv[rows], bias[rows], out[:, rows[: out.shape[1]]]
        self.order = order
        self.keep(self.groups)

    def keep(self, width: int) -> None:
        """Keeps the first groups."""
        self.width, self.queries = width, width * self.shared
        self.qkv, self.qkv_bias, self.out = self._dense
        if width < self.groups:
            rows = self._rows(torch.arange(width)).to(self.out.device)
            self.qkv, self.qkv_bias = self.qkv[rows], self.qkv_bias[rows]
            self.out = self.out[:, : self.columns]

    def project(self, qkv: Tensor) -> None:
        """Takes other weights in the place of `qkv`, of what is kept; they stay when something else is kept."""
        self._dense[0][self._rows(torch.arange(self.width)).to(qkv.device)] = qkv
        self.qkv.copy_(qkv)

    def refit(self, out: Tensor) -> None:
        """Takes other weights [H, columns] in the place of `out`."""
        self.out = out

    def _rows(self, groups: Tensor) -> Tensor:
        """The rows of `qkv` that are of some groups."""
        queries = torch.arange(self.groups * self.shared * self.size).view(self.groups, -1)
        keys, values = (len(queries.flatten()) + torch.arange(2 * self.groups * self.size)).view(2, self.groups, -1)
        return torch.cat([part[groups].flatten() for part in (queries, keys, values)])


@dataclass(frozen=True)
class Layer:
    """One decoder layer: `x += out(attention(norm(x)))`, then `x += ffn(norm(x))`.

    Attributes:
        attention_norm, ffn_norm: [H].
        heads: of the attention.
        ffn: [N, H] to [N, H].
        attention_turn, ffn_turn: [H, H'], what the states are multiplied by as the attention's or the FFN's output is
            added to them, which is of that width; None: by nothing. Only reshaped models have them.
    """

    attention_norm: Tensor
    heads: Heads
    ffn_norm: Tensor
    ffn: nn.Module
    attention_turn: Tensor | None = None
    ffn_turn: Tensor | None = None


@dataclass(frozen=True)
class Backbone:
    """A language model with its head.

    Attributes:
        layers: first to last.
        norm: [H], before the head.
        head: [V, H].
        epsilon: of every norm; where states are narrower than `norm` it is still a mean over H that it is added to.
        entry: [H, H'], what embeddings are multiplied by; None: by nothing.
    """

    layers: tuple[Layer, ...]
    norm: Tensor
    head: Tensor
    epsilon: float
    entry: Tensor | None = None

    def hidden(
        self,
        x: Tensor,
        rotation: Tensor,
        groups: Sequence[Group],
        *,
        last: int | None = None,
        see: SeeHeads | None = None,
    ) -> Iterator[Tensor]:
        """The states [N, H] after each of the first `last` layers (all by default), as they come.

        Args:
            x: [N, H], the embeddings: sequences laid end to end as `groups` says.
            rotation: [N, D/2] complex, M-RoPE.
            see: is shown what each layer's heads say.
        """
        attention, x = _Attention(self, rotation, groups, see), self.entered(x)
        for layer in self.layers[:last]:
            x = self._whole(layer, attention, x)
            yield x

    def entered(self, x: Tensor) -> Tensor:
        """The states [N, H'] before the first layer, of the embeddings x [N, H]."""
        return _turned(x, self.entry)

    def attend(
        self, layer: Layer, x: Tensor, rotation: Tensor, groups: Sequence[Group], see: SeeHeads | None = None
    ) -> Tensor:
        """The states [N, H] between a layer's attention and its FFN, for the states x [N, H] before the layer.

        Args:
            rotation, groups, see: as in `hidden`.
        """
        return self._attend(layer, _Attention(self, rotation, groups, see), x)

    def attention_input(self, layer: Layer, x: Tensor) -> Tensor:
        """What the attention of a layer is given, [N, H], for the states x [N, H] before the layer."""
        return self._norm(x, layer.attention_norm)

    def heads_output(self, layer: Layer, x: Tensor, rotation: Tensor, groups: Sequence[Group]) -> Tensor:
        """What the layer's heads say to the states x [N, H] before it, [N, Q·D], which their `out` is applied to."""
        return _Attention(self, rotation, groups)(layer, self.attention_input(layer, x))

    def heads_at(
        self, layer: Layer, x: Tensor, rotation: Tensor, groups: Sequence[Group], masks: Sequence[Tensor]
    ) -> Tensor:
        """What `heads_output` is where heads look at some tokens only, [N, Q·D].

        Args:
            masks: of each sequence, whether each head looks from each token at each other, [Q, T, T] bool; from every
                token at one at least.
        """
        attention = _Attention(self, rotation, groups)
        sizes = [mask.shape[1] for mask in masks]
        projected = attention.project(layer, self.attention_input(layer, x))
        parts = zip(*(part.transpose(0, 1).split(sizes, dim=1) for part in projected), masks)
        said = [F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True) for q, k, v, mask in parts]
        return torch.cat(said, dim=1).transpose(0, 1).flatten(1)

    def add_heads(self, layer: Layer, x: Tensor, said: Tensor) -> Tensor:
        """What `attend` gives, [N, H], for the states x [N, H] before a layer, its heads saying [N, Q·D]."""
        return torch.addmm(_turned(x, layer.attention_turn), said, layer.heads.out.T)

    def weights(self, layer: Layer, x: Tensor, rotation: Tensor) -> Tensor:
        """By what weights [Q, T, T] float32 each of a layer's heads looks from one sequence's tokens at each other.

        Args:
            x: [T, H], the states before the layer.
            rotation: as in `hidden`.
        """
        attention = _Attention(self, rotation, (Group(1, len(x), 1),))
        query, key, _ = attention.project(layer, self.attention_input(layer, x))
        key = key.repeat_interleave(layer.heads.shared, dim=1)
        products = torch.einsum("qhd,khd->hqk", query.float(), key.float()) / layer.heads.size**0.5
        hidden = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
        return products.masked_fill_(hidden, -torch.inf).softmax(-1)

    def ffn_input(self, layer: Layer, x: Tensor) -> Tensor:
        """What the FFN is given, [N, H], where `attend` gave x [N, H]."""
        return self._norm(x, layer.ffn_norm)

    def feed_forward(self, layer: Layer, x: Tensor) -> Tensor:
        """The states [N, H] after a layer's FFN, in the memory of what `attend` gave, x [N, H], without gradients."""
        if x.requires_grad:
            return _turned(x, layer.ffn_turn) + layer.ffn(self.ffn_input(layer, x))
        if layer.ffn_turn is not None:
            return torch.cat([part @ layer.ffn_turn + layer.ffn(self.ffn_input(layer, part)) for part in x.split(ROWS)])
        for part in x.split(ROWS):
            part.add_(layer.ffn(self.ffn_input(layer, part)))
        return x

    def answers(self, x: Tensor, rotation: Tensor, groups: Sequence[Group], tails: Tensor, *, first: int = 0) -> Tensor:
        """The normed states [M, H] at the groups' tails after the last layer, which is computed there only.

        Args:
            x: [N, H], the states before layer `first`.
            rotation, groups: as in `hidden`.
            tails: [M], where in N the tails are.
        """
        attention = _Attention(self, rotation, groups)
        x = x if first else self.entered(x)
        *before, layer = self.layers[first:]
        for earlier in before:
            x = self._whole(earlier, attention, x)
        here = _turned(x[tails], layer.attention_turn)
        if layer.heads.width:
            attended = attention.at_tails(layer, self._norm(x, layer.attention_norm), tails)
            here = torch.addmm(here, attended, layer.heads.out.T)
        return self.normed(self.feed_forward(layer, here))

    def normed(self, x: Tensor) -> Tensor:
        """What the head is given, [M, H], of states [M, H] after the last layer."""
        return self._norm(x, self.norm)

    def logits(self, x: Tensor) -> Tensor:
        """Normed states [M, H] to [M, V]."""
        return F.linear(x, self.head)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.epsilon * (len(self.norm) / len(weight)))

    def _whole(self, layer: Layer, attention: "_Attention", x: Tensor) -> Tensor:
        return self.feed_forward(layer, self._attend(layer, attention, x))

    def _attend(self, layer: Layer, attention: "_Attention", x: Tensor) -> Tensor:
        if not layer.heads.width:
            return _turned(x, layer.attention_turn).clone()  # What comes next works in the memory of it.
        return self.add_heads(layer, x, attention(layer, self._norm(x, layer.attention_norm)))


def _turned(x: Tensor, turn: Tensor | None) -> Tensor:
    return x if turn is None else x @ turn


class _Attention:
    """Causal attention within each of a batch's sequences; holds what is the same in all layers."""

    def __init__(
        self, backbone: Backbone, rotation: Tensor, groups: Sequence[Group], see: SeeHeads | None = None
    ) -> None:
        self._rotation, self._groups, self._see = rotation, groups, see
        # Spread over the heads once, so that each layer's rotation is one pass over contiguous memory.
        most = max(layer.heads.groups * (layer.heads.shared + 1) for layer in backbone.layers)
        self._spread = rotation[:, None].expand(-1, most, -1).contiguous()
        self._lengths = tuple(group.length for group in groups)
        self._tails = tuple(group.tail for group in groups)
        device, dtype = backbone.norm.device, backbone.norm.dtype
        is_varlen = _VARLEN is not None and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
        self._starts = (
            {asked: _starts(groups, asked, device) for asked in (self._lengths, self._tails)} if is_varlen else {}
        )

    def __call__(self, layer: Layer, x: Tensor) -> Tensor:
        """Normed states [N, H] to heads' outputs [N, Q·D]."""
        said = self._attend(*self.project(layer, x), self._lengths)
        if self._see is not None:
            self._see(said)
        return said

    def project(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed states [N, H] to queries [N, Q, D], keys and values [N, K, D], turned as their positions say."""
        heads = layer.heads
        rotated = heads.queries + heads.width
        qkv = F.linear(x, heads.qkv, heads.qkv_bias).view(len(x), -1, heads.size)
        rotate(qkv[:, :rotated], self._spread[:, :rotated])
        query, key, value = qkv.split([heads.queries, heads.width, heads.width], dim=1)
        return query, key, value

    def at_tails(self, layer: Layer, x: Tensor, tails: Tensor) -> Tensor:
        """Normed states [N, H] to heads' outputs [M, Q·D] at the tails alone."""
        heads = layer.heads
        cut = heads.columns
        query = F.linear(x[tails], heads.qkv[:cut], heads.qkv_bias[:cut]).view(len(tails), -1, heads.size)
        rotate(query, self._rotation[tails, None].expand(-1, heads.queries, -1))
        key_value = F.linear(x, heads.qkv[cut:], heads.qkv_bias[cut:]).view(len(x), -1, heads.size)
        key, value = key_value.split(heads.width, dim=1)
        rotate(key, self._spread[:, : heads.width])
        return self._attend(query, key, value, self._tails)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, asked: tuple[int, ...]) -> Tensor:
        """Queries [·, Q, D], the last `asked` of each sequence by group, to [·, Q·D]."""
        if _VARLEN is not None and self._starts:
            attended = _VARLEN(
                query,
                key,
                value,
                self._starts[asked],
                self._starts[self._lengths],
                max(asked),
                max(self._lengths),
            )
            return attended.flatten(1)
        queries = query.split([group.count * tokens for group, tokens in zip(self._groups, asked)])
        sizes = [group.count * group.length for group in self._groups]
        outputs = [
            _attend_equal(group, *parts)
            for group, *parts in zip(self._groups, queries, key.split(sizes), value.split(sizes))
        ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _attend_equal(group: Group, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of sequences of equal length: the last queries [B·t, Q, D] and all keys [B·T, K, D] to [B·t, Q·D]."""
    query, key, value = (part.unflatten(0, (group.count, -1)).transpose(1, 2) for part in (query, key, value))
    asked, length = query.shape[2], group.length
    is_whole = asked == length  # Then the kernel can skip what is masked.
    mask = None if is_whole else causal_lower_right(asked, length)
    attended = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_whole, enable_gqa=True)
    return attended.transpose(1, 2).flatten(2).flatten(0, 1)


def rotate(x: Tensor, rotation: Tensor) -> None:
    """Turns the pairs of x [N, heads, D] by `rotation` [N, heads, D/2] complex, in place."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    pairs.mul_(rotation)
    if x.dtype != torch.float32:
        x.copy_(torch.view_as_real(pairs).flatten(-2))


def _starts(groups: Sequence[Group], lengths: Sequence[int], device: torch.device) -> Tensor:
    """Where each sequence starts, and where the last one ends: [sequences + 1]."""
    sizes = [length for group, length in zip(groups, lengths) for _ in range(group.count)]
    return F.pad(torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device)
