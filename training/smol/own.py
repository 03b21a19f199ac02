"""What `smol` writes when nobody asks it anything: text for what is pruned from it to learn from, as much as is wanted.

    python -m training.smol.own FOLDER [--tokens N]

Writes `FOLDER/calibration.parquet`, for `lop distil --samples FOLDER`. No sample of any set is looked at: half of the
tokens are documents begun from nothing; the others are questions that the model asks when it is given the beginning of
a user's turn, and its answers (Magpie: Xu et al. 2024, arXiv 2406.08464). All is drawn at temperature 1 from the
likeliest 95%: what is learnt from is spread as what the model knows is. Minutes on a GPU, hours on a CPU.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lop.errors import LopError
from lop.model.find import find_model
from lop.model.samples import PROSE, Sample
from lop.model.smol import NAME
from training.smol.write import write

_DOCUMENT, _TURN = "<|endoftext|>", "<|im_start|>user\n"
_END = "<|im_end|>"
_TOGETHER = {"cpu": 16, "cuda": 2048}  # Sequences.
_LONGEST, _ASKED, _ANSWERED = 192, 48, 16  # Tokens of a document, a question and an answer.
_SHORTEST = 40  # Characters of a document.


class Writer:
    """Draws from the model.

    Args:
        device: a torch device's name.
    """

    def __init__(self, device: str, seed: int) -> None:
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

        folder = find_model(NAME)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
        self._count = _TOGETHER[torch.device(device).type]
        torch.manual_seed(seed)

    def samples(self, tokens: int) -> Iterator[Sample]:
        """Documents of half of so many tokens, then questions and answers."""
        for make in (self._documents, self._questions):
            written = 0
            while written < tokens / 2:
                for sample in make():
                    written += len(self._tokenizer(sample.question + sample.answer)["input_ids"])
                    yield sample

    def _documents(self) -> Iterator[Sample]:
        for text in self._drawn([_DOCUMENT] * self._count, _LONGEST):
            if len(text) >= _SHORTEST:
                yield from _sample("document", PROSE, "", text)

    def _questions(self) -> Iterator[Sample]:
        asked = [text for text in self._drawn([_TURN] * self._count, _ASKED) if text.endswith(("?", "."))]
        for questions in _together(sorted(asked, key=len), self._count):
            prompts = [f"{_TURN}{question}{_END}\n<|im_start|>assistant\n" for question in questions]
            for question, answer in zip(questions, self._drawn(prompts, _ANSWERED)):
                if answer:
                    yield from _sample("question", "word", question, answer)

    @torch.inference_mode()
    def _drawn(self, prompts: Sequence[str], longest: int) -> list[str]:
        """What comes after each prompt, up to the first token that is markup."""
        inputs = self._tokenizer(list(prompts), padding=True, return_tensors="pt").to(self._model.device)
        out = self._model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=0.95, max_new_tokens=longest, use_cache=True
        )
        return [self._text(row) for row in out[:, inputs["input_ids"].shape[1] :].cpu()]

    def _text(self, row: Tensor) -> str:
        special: set[Any] = set(self._tokenizer.all_special_ids)
        ids = row.tolist()
        end = next((place for place, token in enumerate(ids) if token in special), len(ids))
        return str(self._tokenizer.decode(ids[:end])).strip()


def _together(questions: Sequence[str], count: int) -> Iterator[Sequence[str]]:
    yield from (questions[start : start + count] for start in range(0, len(questions), count))


def _sample(kind: str, form: str, question: str, answer: str) -> Iterator[Sample]:
    """One, or none where the text holds a chat's markup or nothing."""
    try:
        yield Sample(b"", f"own {kind}", "own", kind, form, question, (), answer)
    except LopError:
        return


def write_own(folder: Path, tokens: int, *, seed: int = 0) -> int:
    """Makes the file, and returns how many samples it holds."""
    writer = Writer("cuda" if torch.cuda.is_available() else "cpu", seed)
    samples = list(dict.fromkeys(writer.samples(tokens)))
    folder.mkdir(parents=True, exist_ok=True)
    write(samples, folder / "calibration.parquet")
    return len(samples)


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of all samples together, about")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(write_own(options.folder, options.tokens, seed=options.seed), "samples")


if __name__ == "__main__":
    main()
