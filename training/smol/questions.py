"""Batches of questions as `smol` reads them, about pictures and about what words mean, and prose."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lop.model.samples import LETTERS, Sample, prompt_text
from training.smol.knowledge import Fact
from training.smol.make_samples import Dealt
from training.smol.make_samples import ask as ask_fact
from training.tiny.images import Picture
from training.tiny.questions import ask, is_negated, values_of

# What is asked of each source's images, and how often. Of what is known of a country, only what SmolLM2 may know.
_KINDS: dict[str, dict[str, float]] = {
    "easy-vqa": {"colour": 1, "shape": 1},
    "fashion-mnist": {"product": 3, "worn": 1},
    "flags": {"country": 6, "capital": 1, "continent": 1, "language": 1, "demonym": 1, "currency": 1},
}


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
        dealt = Dealt.all()
        self._facts: dict[str, list[Fact]] = {}
        for fact in dealt.facts_of("training"):
            self._facts.setdefault(fact.kind, []).append(fact)
        self._weights = np.sqrt([len(facts) for facts in self._facts.values()])
        self._passages = [passage.text for passage in dealt.passages_of("training")]

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
