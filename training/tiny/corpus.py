"""What the language model is trained on: image tokens computed once, and tokenised questions about what they show."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from lop.model.samples import FORMS, prompt_text
from training.tiny import vision
from training.tiny.architecture import TEMPLATE
from training.tiny.images import Picture
from training.tiny.questions import KINDS, ask, is_negated

SOURCE_SHARES = {"easy-vqa": 0.16, "fashion-mnist": 0.12, "flags": 0.72}
_IMAGE_TOKENS = 4
_TURNS = 4
PER_IMAGE = 8
_EASY = ("colour", "shape", "product", "worn", "continent", "subregion")
# Batches are made this many at a time, and an image's questions are drawn this many rows at a time: rows of one length.
_DRAWN, _SPLIT = 20, 5


@dataclass
class Corpus:
    """Image tokens of all training images, grouped by what is to be seen.

    Attributes:
        tokens: [n, 4, H], bfloat16.
        starts: [groups + 1], where each group's images begin.
        pictures: one picture of each group.
    """

    tokens: Tensor
    starts: np.ndarray
    pictures: list[Picture]

    @classmethod
    @torch.no_grad()
    def embed(cls, model: Qwen2_5_VLForConditionalGeneration, parts: Sequence[Sequence[Picture]]) -> "Corpus":
        """Runs the tower over every picture (shapes in all their turns and mirrorings)."""
        pictures: list[Picture] = []
        tokens: list[Tensor] = []
        for part in parts:
            pixels = vision.pixels_of(part)
            turned = [pixels]
            if part[0].source == "easy-vqa":
                turned = [torch.rot90(flip, k, (2, 3)) for flip in (pixels, pixels.flip(3)) for k in range(_TURNS)]
            elif part[0].source == "fashion-mnist":
                turned = [pixels, pixels.flip(3)]
            for version in turned:
                tokens += [vision.features(model, chunk).bfloat16() for chunk in version.split(256)]
                pictures += part
        order = sorted(range(len(pictures)), key=lambda index: pictures[index].labels)
        grouped = [pictures[index].labels for index in order]
        starts = [i for i in range(len(grouped)) if i == 0 or grouped[i] != grouped[i - 1]]
        return cls(
            torch.cat(tokens)[order], np.array([*starts, len(order)]), [pictures[order[start]] for start in starts]
        )

    def state(self) -> dict[str, object]:
        """What `Corpus(**state)` takes."""
        return {"tokens": self.tokens, "starts": self.starts, "pictures": self.pictures}

    def draw(self, groups: Tensor, random: np.random.Generator) -> Tensor:
        """[b, 4, H]: a random image of each group."""
        chosen = groups.numpy()
        low, high = self.starts[chosen], self.starts[chosen + 1]
        return self.tokens[torch.from_numpy(random.integers(low, np.maximum(high, low + 1)))]


@dataclass
class Questions:
    """Tokenised prompts with their answers.

    Attributes:
        ids: [q, T], padded on the right.
        lengths: [q], tokens before the padding.
        answers: [q], how many of them, the last ones, are the answer and the end of turn.
        seen: [q], the group of images that the question is about.
        group: [q], an index of `names`.
        negated: [q] bool, whether the question asks if something is not so.
        names: of the kinds and forms, for the log.
        image_token: the id of `<|image_pad|>`.
        yes_token, no_token: the first ids of `yes` and `no`.
    """

    ids: Tensor
    lengths: Tensor
    answers: Tensor
    seen: Tensor
    group: Tensor
    negated: Tensor
    names: list[str]
    image_token: int
    yes_token: int
    no_token: int

    @property
    def prefix(self) -> Tensor:
        """[P], the tokens before every question: the start of the turn and the image."""
        return self.ids[0, : self._prefix_length()]

    def positions(self, length: int) -> Tensor:
        """[3, P + length], M-RoPE: the four image tokens take the places of two."""
        places = torch.arange(self._prefix_length() + length).repeat(3, 1)
        first = int((self.prefix == self.image_token).float().argmax())
        places[:, first : first + _IMAGE_TOKENS] = first + torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
        places[:, first + _IMAGE_TOKENS :] -= 2
        return places

    def batches(self, random: np.random.Generator, images: int, *, progress: float) -> Iterator[Tensor]:
        """Batches [images, PER_IMAGE] of questions about the same group of images, all of similar length.

        Negations and options' letters come in as training goes on.
        """
        weights = np.ones(len(self.ids))
        choice = np.array([name.startswith("choice") for name in self.names])[self.group.numpy()]
        weights[choice] = np.clip(10 * progress - 3.5, 1e-6, 1)
        weights[self.negated.numpy()] = np.clip(10 * progress - 2.5, 1e-6, 1)
        # What few values can answer teaches what equality is, and then what a letter stands for; the rest follows.
        for form, fade in (
            ("yes_no", np.clip(12 - 24 * progress, 1, 6)),
            ("choice", np.clip(15 - 22 * progress, 1, 6)),
        ):
            easy = [f"{form}.{kind}" for kind in _EASY]
            weights[np.isin(self.names, easy)[self.group.numpy()]] *= fade
        lengths = self.lengths.numpy()
        draws = []
        for anchor in random.choice(len(weights), _DRAWN * images // _SPLIT, p=weights / weights.sum()):
            mine = self._of_group[int(self.seen[anchor])]
            chosen = random.choice(mine, _SPLIT * PER_IMAGE, p=weights[mine] / weights[mine].sum())
            draws.append(chosen[np.argsort(lengths[chosen], kind="stable")].reshape(_SPLIT, PER_IMAGE))
        rows = np.concatenate(draws)
        rows = rows[np.argsort(lengths[rows].max(1), kind="stable")]
        for index in random.permutation(len(rows) // images):
            yield torch.from_numpy(rows[index * images : (index + 1) * images])

    def _prefix_length(self) -> int:
        return int((self.ids[0] == self.image_token).nonzero()[-1]) + 2

    @cached_property
    def _of_group(self) -> dict[int, np.ndarray]:
        seen = self.seen.numpy()
        return {int(group): (seen == group).nonzero()[0] for group in np.unique(seen)}


def make_questions(
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    count: int,
    seed: int,
    shares: Mapping[str, float] = SOURCE_SHARES,
) -> Questions:
    """Random questions of all kinds and forms about random groups of images, of each source its share."""
    random = np.random.default_rng([seed, 1])
    by_source = {
        source: [i for i, picture in enumerate(corpus.pictures) if picture.source == source] for source in KINDS
    }
    sources = random.choice(list(shares), count, p=list(shares.values()))
    texts, answers, seen, groups, negated = [], [], [], [], []
    for source in sources:
        group = int(random.choice(by_source[source]))
        kind, form = str(random.choice(KINDS[source])), str(random.choice(FORMS))
        sample = ask(corpus.pictures[group], kind, form, random)
        if sample is None:
            continue
        texts.append(_chat(prompt_text(sample)))
        answers.append(sample.answer)
        seen.append(group)
        groups.append(f"{form}.{kind}")
        negated.append(form == "yes_no" and is_negated(sample.question))
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ends = tokenizer(answers, add_special_tokens=False)["input_ids"]
    names = sorted(set(groups))
    sequences = [[*prompt, *end, tokenizer.eos_token_id] for prompt, end in zip(prompts, ends)]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.full((len(sequences), int(lengths.max())), tokenizer.pad_token_id)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return Questions(
        ids=ids,
        lengths=lengths,
        answers=torch.tensor([len(end) + 1 for end in ends]),
        seen=torch.tensor(seen),
        group=torch.tensor([names.index(name) for name in groups]),
        negated=torch.tensor(negated),
        names=names,
        image_token=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        yes_token=tokenizer.convert_tokens_to_ids("yes"),
        no_token=tokenizer("no", add_special_tokens=False)["input_ids"][0],
    )


def _chat(text: str) -> str:
    """What the chat template makes of one question, with the image's four tokens in place."""
    assert TEMPLATE.startswith("{% for message in messages %}<|im_start|>")
    picture = "<|vision_start|>" + "<|image_pad|>" * _IMAGE_TOKENS + "<|vision_end|>"
    return f"<|im_start|>user\n{picture}{text}<|im_end|>\n<|im_start|>assistant\n"
