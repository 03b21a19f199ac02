"""Stage 1: the vision tower alone, taught to write what it sees in the language model's own word embeddings.

The pooled image tokens are scored against the (fixed) embeddings of the words for colour, shape, product and country.
So the word 'teal' in a question and a teal image look alike to the language model, and questions of yes and no, which
ask whether what is seen equals what is said, become learnable.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_position_ids, rotate_half

from training.tiny.architecture import HIDDEN, MERGE, PATCH
from training.tiny.facts import countries
from training.tiny.images import SIDE, Picture, decode, draw_flag, products, shapes
from training.tiny.questions import values_of

_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
_ATTRIBUTES = ("colour", "shape", "product", "country")


def flag_pictures(first_seed: int, renderings: int) -> list[Picture]:
    """Renderings of every flag, from consecutive seeds."""
    return [
        Picture(draw_flag(c.code, seed), f"flags/{c.code}/{seed}", "flags", (("country", c.name),))
        for c in countries()
        for seed in range(first_seed, first_seed + renderings)
    ]


def pixels_of(pictures: Sequence[Picture]) -> Tensor:
    """[n, 3, 64, 64] uint8."""
    return torch.from_numpy(np.stack([decode(picture.image) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


def patchify(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What the processor makes of images [n, 3, 64, 64] uint8: patches [n·64, 384] and grid [n, 3]."""
    normal = (pixels.float() / 255 - _MEAN[:, None, None]) / _STD[:, None, None]
    blocks = SIDE // PATCH // MERGE
    split = normal.reshape(-1, 3, blocks, MERGE, PATCH, blocks, MERGE, PATCH)
    patches = split.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    grid = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]]).repeat(len(pixels), 1)
    return patches.reshape(-1, 3 * 2 * PATCH * PATCH), grid


def features(model: Qwen2_5_VLForConditionalGeneration, pixels: Tensor) -> Tensor:
    """[n, 4, H] image tokens."""
    tower = model.model.visual
    return tower.merger(states(tower, pixels).flatten(0, 1)).view(len(pixels), (SIDE // PATCH // MERGE) ** 2, -1)


def states(tower: nn.Module, pixels: Tensor) -> Tensor:
    """[n, 64, D]: what the tower hands to its merger.

    The same function as the tower's own forward, which attends to one image after the other; all images here have
    one size, so they go through attention together, four times as fast.
    """
    patches, grid = patchify(pixels)
    states = tower.patch_embed(patches).view(len(pixels), -1, tower.config.hidden_size)
    positions = get_vision_position_ids(grid[:1], MERGE)
    cos, sin = tower.rotary_pos_emb(states, positions)
    for block in tower.blocks:
        states = states + _attend(block.attn, block.norm1(states), cos, sin)
        states = states + block.mlp(block.norm2(states))
    return states


def _attend(attention: nn.Module, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    count, tokens, _ = states.shape
    q, k, v = attention.qkv(states).view(count, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = (x * cos.to(x.dtype) + rotate_half(x) * sin.to(x.dtype) for x in (q, k))
    # On a CPU the fused attention's backward pass takes longer than everything else together.
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return attention.proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


def word_vectors(model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, kind: str) -> Tensor:
    """[values, H]: the mean embedding of the words of each value of a kind, at unit scale."""
    table = model.get_input_embeddings().weight.detach()
    rows = [table[tokenizer(f" {value}", add_special_tokens=False)["input_ids"]].mean(0) for value in values_of(kind)]
    return F.normalize(torch.stack(rows), dim=1) * HIDDEN**0.5


class Pool:
    """Training images as pixels, with the index of each attribute's value (−1 where it has none)."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self.pixels = pixels_of(pictures)
        index = {kind: {value: i for i, value in enumerate(values_of(kind))} for kind in _ATTRIBUTES}
        self.labels = torch.tensor(
            [[index[kind].get(dict(p.labels).get(kind, ""), -1) for kind in _ATTRIBUTES] for p in pictures]
        )

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random images, shifted by chance (and, for shapes, turned and mirrored), with their labels."""
        chosen = torch.randint(len(self.pixels), (count,), generator=generator)
        pixels = self.pixels[chosen]
        dy, dx = torch.randint(-4, 5, (2,), generator=generator).tolist()
        pixels = torch.roll(pixels, (dy, dx), (2, 3)) if self.labels[0, 3] < 0 else pixels
        if self.labels[0, 0] >= 0:
            pixels = torch.rot90(pixels, int(torch.randint(4, (1,), generator=generator)), (2, 3))
        if self.labels[0, 3] < 0 and torch.rand(1, generator=generator) < 0.5:
            pixels = pixels.flip(3)
        return pixels, self.labels[chosen]


def train_vision(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pools: Sequence[Pool],
    checkpoint: Path,
    *,
    steps: int,
    batch: int = 64,
    rate: float = 2e-3,
    seed: int = 0,
) -> None:
    """Trains the tower in place; goes on from `checkpoint` if it is there."""
    vectors = [word_vectors(model, tokenizer, kind) for kind in _ATTRIBUTES]
    temperature = nn.Parameter(torch.tensor(0.0))
    tower = model.model.visual
    optimiser = torch.optim.AdamW([*tower.parameters(), temperature], lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        tower.load_state_dict(state["tower"])
        temperature.data = state["temperature"]
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        step = state["step"]
    start = time.time()
    while step < steps:
        drawn = [pool.draw(batch, generator) for pool in pools]
        labels = torch.cat([label for _, label in drawn])
        with torch.autocast("cpu", torch.bfloat16):
            pooled = features(model, torch.cat([pixels for pixels, _ in drawn])).mean(1)
        scale = temperature.exp() / HIDDEN**0.5
        loss = torch.zeros(())
        hits = []
        for column, vector in enumerate(vectors):
            has = labels[:, column] >= 0
            logits = pooled[has].float() @ vector.T * scale
            loss = loss + F.cross_entropy(logits, labels[has, column])
            hits.append((logits.argmax(1) == labels[has, column]).float().mean().item())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        step += 1
        if step % 50 == 0:
            shown = " ".join(f"{kind} {hit:.3f}" for kind, hit in zip(_ATTRIBUTES, hits))
            print(f"vision {step}/{steps} {time.time() - start:.0f}s loss {loss.item():.3f} {shown}", flush=True)
        if step % 500 == 0 or step == steps:
            state = {
                "tower": tower.state_dict(),
                "temperature": temperature.data,
                "optimiser": optimiser.state_dict(),
                "schedule": schedule.state_dict(),
                "generator": generator.get_state(),
                "step": step,
            }
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)


@torch.no_grad()
def rescale(model: Qwen2_5_VLForConditionalGeneration, pool: Pool) -> None:
    """Scales the tower's output to twice a word embedding's length, so that both enter the residual stream alike."""
    length = features(model, pool.pixels[:256]).norm(dim=-1).mean()
    factor = 2 * model.get_input_embeddings().weight.norm(dim=1).mean() / length
    last = model.model.visual.merger.mlp[2]
    last.weight.mul_(factor)
    last.bias.mul_(factor)


@torch.no_grad()
def accuracy(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, pool: Pool
) -> dict[str, float]:
    """The share of images whose nearest word is right, by attribute."""
    pooled = torch.cat([features(model, part).mean(1) for part in pool.pixels.split(256)])
    result = {}
    for column, kind in enumerate(_ATTRIBUTES):
        has = pool.labels[:, column] >= 0
        if has.any():
            best = (pooled[has] @ word_vectors(model, tokenizer, kind).T).argmax(1)
            result[kind] = (best == pool.labels[has, column]).float().mean().item()
    return result


def training_pools(renderings: int) -> tuple[list[Picture], list[Picture], list[Picture]]:
    """The pictures that are trained on: shapes, products, flags."""
    return list(shapes("train")), list(products("train")), flag_pictures(1000, renderings)
