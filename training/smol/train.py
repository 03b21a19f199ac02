"""Trains `smol`'s eyes: first the merger alone on embeddings of words, then everything through the language model.

    python -m training.smol.train --work WORK

Seeded; interrupted, the same command goes on from the last checkpoint in WORK. On a GPU if there is one.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lop.model.find import assets
from lop.model.samples import FORMS
from lop.model.smol import NAME
from training.smol.backbone import Backbone
from training.smol.eyes import Eyes, save_eyes
from training.smol.questions import Asked, Text, ask_about, tokenised
from training.smol.seen import see
from training.tiny.corpus import Corpus
from training.tiny.images import Picture

_IMAGE_TOKENS = 4
_OPENING = "<|im_start|>user\n"


@dataclass(frozen=True)
class Stage:
    """A part of the training, with a rate that rises at once and falls over its second half.

    Attributes:
        steps: of a batch of one form each.
        forms: the share of each form.
        text: the share of batches about words and countries, without an image.
        prose: the share of batches of prose, on which the language model is to say what it said as pretrained.
    """

    steps: int
    forms: dict[str, float]
    text: float = 0.0
    prose: float = 0.0


STAGES = {
    "words": Stage(1000, {"word": 0.75, "yes_no": 0.15, "choice": 0.1}),
    "forms": Stage(2400, {"word": 0.2, "yes_no": 0.4, "choice": 0.4}, text=0.2, prose=0.2),
}
# After this layer a probe tells, where a value has been read, whether it is what is seen; see `_loss`.
_PROBED, _PROBING = 17, 0.5
_SOURCES = {"easy-vqa": 0.2, "fashion-mnist": 0.25, "flags": 0.55}
_PASSAGES, _PASSAGE = 6, 64  # of a batch of prose, and the most tokens of each
_SAVE_SECONDS = 240


def main() -> None:
    """Parses the command line and runs both stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints and caches are kept")
    parser.add_argument("--out", type=Path, default=assets(NAME) / "eyes.safetensors")
    parser.add_argument("--align-steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=14, help="questions of a step")
    parser.add_argument("--rank", type=int, default=24, help="of the changes of the attention's projections")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if not (cached := options.work / "seen.pt").exists():
        _store(see(options.seed).state(), cached)
    corpus = Corpus(**torch.load(cached, weights_only=False))
    tokenizer = AutoTokenizer.from_pretrained(assets(NAME) / "model")
    torch.manual_seed(options.seed)
    backbone = Backbone(options.rank)
    eyes = Eyes(backbone.table)
    align(eyes, backbone, tokenizer, corpus, options)
    probe = nn.Linear(backbone.table.shape[1], 1)
    parts = nn.ModuleDict({"eyes": eyes, "backbone": backbone, "probe": probe})
    parts.to("cuda" if torch.cuda.is_available() else "cpu")
    for name, stage in STAGES.items():
        train(name, stage, parts, tokenizer, corpus, options)
    save_eyes(eyes, backbone, options.out)


def described(tokenizer: PreTrainedTokenizerFast, picture: Picture) -> list[int]:
    """Four tokens that say what is to be seen: its words, over and over."""
    words = [value for _, value in picture.labels]
    if picture.source != "easy-vqa":
        words.append("flag" if picture.source == "flags" else "product")
    ids = tokenizer("".join(f" {word}" for word in words), add_special_tokens=False)["input_ids"]
    return (ids * _IMAGE_TOKENS)[:_IMAGE_TOKENS]


def align(
    eyes: Eyes,
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    options: argparse.Namespace,
    *,
    batch: int = 192,
    rate: float = 1e-3,
) -> None:
    """Teaches the merger to write what is seen as the embeddings of the words that describe it; takes minutes."""
    done = options.work / "aligned.pt"
    if done.exists():
        eyes.load_state_dict(torch.load(done, weights_only=True))
        return
    table = backbone.table.float()
    wanted = torch.tensor([described(tokenizer, picture) for picture in corpus.pictures])
    used, wanted = wanted.unique(return_inverse=True)
    words = table[used]
    length = words.norm(dim=1).mean()
    directions = F.normalize(words, dim=1)
    optimiser = torch.optim.AdamW(eyes.merger.mlp.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=options.align_steps, pct_start=0.1)
    random = np.random.default_rng(options.seed)
    draw = _groups(corpus)
    start = time.time()
    for step in range(1, options.align_steps + 1):
        groups = draw(random, batch, list(_SOURCES.values()))
        with torch.autocast("cpu", torch.bfloat16):
            seen = eyes.see(corpus.draw(groups, random)).float()
        logits = 20 * F.normalize(seen, dim=-1) @ directions.T
        target = wanted[groups]
        naming = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        loss = naming + (seen - words[target]).square().sum(-1).mean() / length**2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 25 == 0:
            hit = (logits.argmax(-1) == target).float().mean()
            print(
                f"align {step}/{options.align_steps} {time.time() - start:.0f}s loss {loss:.3f} {hit:.3f}", flush=True
            )
    _store(eyes.state_dict(), done)


def _groups(corpus: Corpus) -> Any:
    """A function that draws groups of images, by shares of the sources in the order of `_SOURCES`."""
    members = [
        np.array([i for i, picture in enumerate(corpus.pictures) if picture.source == source]) for source in _SOURCES
    ]

    def draw(random: np.random.Generator, count: int, shares: Sequence[float]) -> Tensor:
        sources = random.choice(len(members), count, p=np.array(shares) / sum(shares))
        return torch.tensor([int(random.choice(members[source])) for source in sources])

    return draw


def train(
    name: str,
    stage: Stage,
    parts: nn.ModuleDict,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    options: argparse.Namespace,
) -> None:
    """Trains the eyes and the low-rank changes on answers."""
    trained = [parameter for parameter in parts.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0, betas=(0.9, 0.98))
    random = np.random.default_rng([options.seed, list(STAGES).index(name)])
    checkpoint = options.work / f"{name}.pt"
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        parts.load_state_dict(state["parts"])
        optimiser.load_state_dict(state["optimiser"])
        random.bit_generator.state = state["random"]
        step = state["step"]
    draw = _groups(corpus)
    text = Text()
    table: Any = parts["backbone"].table
    device = table.device
    opening = table[tokenizer(_OPENING, add_special_tokens=False)["input_ids"]].float()
    hits: dict[str, list[float]] = {}
    first, start, saved = step, time.time(), time.time()
    while step < stage.steps:
        kind = random.choice(["prose", "text", "image"], p=[stage.prose, stage.text, 1 - stage.prose - stage.text])
        # All of one form, and so of similar length.
        form = str(random.choice(list(stage.forms), p=list(stage.forms.values())))
        if kind == "prose":
            loss = _drift(parts, tokenizer, [text.passage(random) for _ in range(_PASSAGES)])
            hits.setdefault("drift.prose", []).append(loss.item())
        else:
            if kind == "text":
                form = "word" if form == "word" else "choice"
                asked = tokenised(tokenizer, [text.draw(form, options.batch if form == "word" else 8, random)])
                before, places = opening[None], torch.arange(len(opening) + asked.ids.shape[2]).repeat(3, 1)
            else:
                count = 1 if form == "word" else 2
                chosen = draw(random, options.batch // count, list(_SOURCES.values()))
                asked = tokenised(tokenizer, [ask_about(corpus.pictures[i], form, count, random) for i in chosen])
                before = _before(parts["eyes"], opening, corpus.draw(chosen, random).to(device))
                places = _places(len(opening) + 1, before.shape[1], asked.ids.shape[2])
            loss, right, told = _loss(parts, before, places.to(device), asked.to(device))
            for names, row in zip(asked.names, right.tolist()):
                for one, hit in zip(names, row):
                    hits.setdefault(one, []).append(hit)
            if len(told):
                hits.setdefault(f"told.{form}", []).extend(told.tolist())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = options.rate * min(1.0, (step + 1) / 30, 2 * (1 - step / stage.steps) + 0.02)
        optimiser.step()
        step += 1
        if step % 10 == 0:
            pace = (time.time() - start) / (step - first)
            print(f"{name} {step}/{stage.steps} {pace:.2f}s/step loss {loss.item():.3f} {_shown(hits)}", flush=True)
        if step == stage.steps or time.time() - saved > _SAVE_SECONDS:
            state = {
                "parts": parts.state_dict(),
                "optimiser": optimiser.state_dict(),
                "random": random.bit_generator.state,
                "step": step,
            }
            _store(state, checkpoint)
            save_eyes(parts["eyes"], parts["backbone"], options.work / "eyes.safetensors")
            saved = time.time()


def _before(eyes: Any, opening: Tensor, seen: Tensor) -> Tensor:
    """[b, P, H]: the start of the user's turn and an image, for what is handed to the merger, [b, 4, 1024]."""
    with torch.autocast(seen.device.type, torch.bfloat16):
        images = eyes.see(seen).float()
    start, end = eyes.tokens[-2:, None]
    return torch.stack([torch.cat([opening, start, image, end]) for image in images])


def _loss(parts: nn.ModuleDict, before: Tensor, places: Tensor, asked: Asked) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss of the answers' tokens, whether each answer [b, K] is exactly right, and whether each probe is.

    The probe is what makes yes or no and options learnable: both depend on whether a word equals what is seen, and from
    the answers alone that stayed at chance.

    Args:
        before: [b, P, H], what stands before the questions.
        places: [3, P + S], M-RoPE.
    """
    table: Any = parts["backbone"].table
    questions = F.embedding(asked.ids, table).float()
    between, states = parts["backbone"](before, questions, places, probed=_PROBED)
    row, question, column = asked.answers.nonzero(as_tuple=True)
    right = asked.ids[row, question, column]
    logits = F.linear(states[row, question, column - 1].bfloat16(), table).float()
    missed = (logits.detach().argmax(1) != right).float()
    misses = torch.zeros(asked.ids.shape[:2], device=table.device).index_put_((row, question), missed, accumulate=True)
    loss = F.cross_entropy(logits, right)
    truth = asked.truth[asked.truth >= 0].float()
    verdicts = parts["probe"](F.layer_norm(between[asked.truth >= 0], between.shape[-1:]))[:, 0]
    if len(truth):
        loss = loss + _PROBING * F.binary_cross_entropy_with_logits(verdicts, truth)
    return loss, (misses == 0).float(), ((verdicts > 0) == (truth > 0)).float()


def _drift(parts: nn.ModuleDict, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """How far the language model has come from itself as pretrained: KL(pretrained ‖ now), nats a token."""
    backbone: Any = parts["backbone"]
    rows = [row[:_PASSAGE] for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    # Cut to one length, as nothing is padded.
    length = min(map(len, rows)) // 4 * 4
    ids = torch.tensor([row[:length] for row in rows], device=backbone.table.device)[None]
    before = F.embedding(torch.tensor([[tokenizer.pad_token_id]], device=ids.device), backbone.table).float()
    words = F.embedding(ids, backbone.table).float()
    places = torch.arange(1 + length, device=ids.device).repeat(3, 1)

    def logs(*, changed: bool) -> Tensor:
        states = backbone(before, words, places, probed=_PROBED, changed=changed)[1]
        return F.linear(states[0].bfloat16(), backbone.table).float().log_softmax(-1).flatten(0, 1)

    with torch.no_grad():
        pretrained = logs(changed=False)
    return F.kl_div(logs(changed=True), pretrained, log_target=True, reduction="batchmean")


def _places(first: int, before: int, after: int) -> Tensor:
    """[3, before + after], M-RoPE: the four image tokens take the places of two."""
    places = torch.arange(before + after).repeat(3, 1)
    places[:, first : first + _IMAGE_TOKENS] = first + torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
    places[:, first + _IMAGE_TOKENS :] -= 2
    return places


def _shown(hits: dict[str, list[float]]) -> str:
    """The share of right answers, over the last 200 of each kind and form."""
    for values in hits.values():
        del values[:-200]
    whole = " ".join(
        f"{form} {np.mean([h for name, values in hits.items() if name.startswith(form) for h in values] or [0]):.2f}"
        for form in FORMS
    )
    return f"[{whole}] " + " ".join(f"{name} {np.mean(values):.2f}" for name, values in sorted(hits.items()))


def _store(state: Any, path: Path) -> None:
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


if __name__ == "__main__":
    main()
