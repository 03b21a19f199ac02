"""Trains `smol`'s eyes: first the merger alone on embeddings of words, then everything through the language model.

    python -m training.smol.train --work WORK

Seeded; interrupted, the same command goes on from the last checkpoint in WORK. On a GPU if there is one.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lop.model.find import assets
from lop.model.samples import FORMS, LETTERS, Sample, prompt_text
from lop.model.smol import NAME
from training.smol.backbone import Backbone
from training.smol.eyes import Eyes, save_eyes
from training.smol.knowledge import Fact
from training.smol.make_samples import SEED, deal, training_facts
from training.smol.make_samples import ask as ask_fact
from training.smol.prose import passages
from training.smol.seen import see
from training.tiny.corpus import Corpus
from training.tiny.images import Picture
from training.tiny.questions import ask, is_negated, values_of

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
# What is asked of each source's images, and how often. Of what is known of a country, only what SmolLM2 may know.
_KINDS: dict[str, dict[str, float]] = {
    "easy-vqa": {"colour": 1, "shape": 1},
    "fashion-mnist": {"product": 3, "worn": 1},
    "flags": {"country": 6, "capital": 1, "continent": 1, "language": 1, "demonym": 1, "currency": 1},
}
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


@dataclass(frozen=True)
class Asked:
    """A batch of questions.

    Attributes:
        ids: [b, K, S], the questions as they follow the image, with their answers and the end of turn, padded.
        answers: [b, K, S] bool, where the answers and the ends of turn are.
        truth: [b, K, S], where a value ends that the question or an option names: whether it is right; −1 elsewhere.
        names: [b][K], kind and form.
    """

    ids: Tensor
    answers: Tensor
    truth: Tensor
    names: list[list[str]]

    def to(self, device: torch.device) -> "Asked":
        """The batch on a device."""
        return Asked(self.ids.to(device), self.answers.to(device), self.truth.to(device), self.names)


def ask_about(picture: Picture, form: str, count: int, random: np.random.Generator) -> list[Sample]:
    """Random questions of one form about a picture."""
    weights = _KINDS[picture.source]
    found: list[Sample] = []
    while len(found) < count:
        kind = str(random.choice(list(weights), p=np.array(list(weights.values())) / sum(weights.values())))
        sample = ask(picture, kind, form, random)
        if sample is not None:
            found.append(sample)
    return found


class Text:
    """Questions about words and countries, and prose, that are in none of the sets of samples."""

    def __init__(self) -> None:
        self._facts: dict[str, list[Fact]] = {}
        for fact in training_facts():
            self._facts.setdefault(fact.kind, []).append(fact)
        self._weights = np.sqrt([len(facts) for facts in self._facts.values()])
        told = passages(SEED)
        sets = deal(passage.chapter for passage in told)
        self._passages = [passage.text for passage in told if sets[passage.chapter] == "training"]

    def passage(self, random: np.random.Generator) -> str:
        """A random piece of prose."""
        return self._passages[random.integers(len(self._passages))]

    def draw(self, form: str, count: int, random: np.random.Generator) -> list[Sample]:
        """Random questions of a form."""
        found: list[Sample] = []
        while len(found) < count:
            kind = str(random.choice(list(self._facts), p=self._weights / self._weights.sum()))
            fact = self._facts[kind][random.integers(len(self._facts[kind]))]
            sample = ask_fact(fact, form, random) if form in fact.forms else None
            if sample is not None:
                found.append(sample)
        return found


def tokenised(tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sequence[Sample]]) -> Asked:
    """Samples, as many in each row, as they follow what stands before them."""
    flat = [sample for mine in samples for sample in mine]
    texts = [f"{prompt_text(s)}<|im_end|>\n<|im_start|>assistant\n" for s in flat]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    prompts = encoded["input_ids"]
    ends = tokenizer([s.answer for s in flat], add_special_tokens=False)["input_ids"]
    ends = [[*end, tokenizer.eos_token_id] for end in ends]
    longest = max(len(prompt) + len(end) for prompt, end in zip(prompts, ends))
    longest = -(-longest // 4) * 4  # Few distinct lengths: matrix kernels are prepared once for each shape.
    ids = torch.full((len(flat), longest), tokenizer.pad_token_id)
    answers = torch.zeros(len(flat), longest, dtype=torch.bool)
    truth = torch.full((len(flat), longest), -1)
    for row, (prompt, end, offsets) in enumerate(zip(prompts, ends, encoded["offset_mapping"])):
        ids[row, : len(prompt) + len(end)] = torch.tensor([*prompt, *end])
        answers[row, len(prompt) : len(prompt) + len(end)] = True
        for last, is_right in _values(flat[row]):
            truth[row, next(i for i, (_, stop) in enumerate(offsets) if stop >= last)] = is_right
    shape = (len(samples), -1, longest)
    names = [[f"{sample.form}.{sample.kind}" for sample in mine] for mine in samples]
    return Asked(ids.view(shape), answers.view(shape), truth.view(shape), names)


def _values(sample: Sample) -> Iterator[tuple[int, bool]]:
    """Where in the prompt each value ends that a question or its options name, and whether it is right."""
    if sample.form == "yes_no":
        value = max((value for value in values_of(sample.kind) if value in sample.question), key=len)
        yield sample.question.rindex(value) + len(value), (sample.answer == "yes") != is_negated(sample.question)
    place = len(sample.question)
    for letter, option in zip(LETTERS, sample.options):
        place += len(f"\n{letter}. {option}")
        yield place, letter == sample.answer


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
