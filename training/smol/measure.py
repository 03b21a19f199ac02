"""What a language model alone answers of the samples without an image.

    python -m training.smol.measure MODEL [--set NAME] [--each N]

MODEL is a folder that transformers loads as a causal language model, or a GGUF file. Each question is asked in the form
of a chat; its options are told apart by the log-probability of their text and, written below the question, by that of
their letter. Of words is said whether each token of the answer is the likeliest. One thread, bfloat16.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lop.model.samples import LETTERS, Sample, load_samples, prompt_text
from training.smol.make_samples import ASSETS, SETS

_BATCH = 32
_DOCUMENT_START = "<|endoftext|>"  # As LOP begins prose without a context.


def main() -> None:
    """Prints a line for each kind and form: how many, chance, and what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--set", choices=SETS, default="test")
    parser.add_argument("--each", type=int, default=10**6, help="the most samples of a kind and form")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {"gguf_file": options.model.name} if options.model.suffix == ".gguf" else {}
    folder = options.model.parent if found else options.model
    tokenizer = AutoTokenizer.from_pretrained(folder, **found)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **found).eval()
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in load_samples(ASSETS / "smol" / "samples" / f"{options.set}.parquet"):
        if not sample.image:
            groups.setdefault((sample.kind, sample.form), []).append(sample)
    for (kind, form), samples in groups.items():
        measured = {"choice": _choices, "word": _words, "text": _prose}[form](model, tokenizer, samples[: options.each])
        print(f"{kind:18} {form:7} {min(len(samples), options.each):4}  {measured}", flush=True)


def _choices(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> str:
    right = np.array([LETTERS.index(sample.answer) for sample in samples])
    plain = [(_chat(sample.question), option) for sample in samples for option in sample.options]
    listed = [(_chat(prompt_text(sample)), letter) for sample in samples for letter, _ in zip(LETTERS, sample.options)]
    hits = []
    for pairs in (plain, listed):
        logs = np.array([sum(log) for log, _ in _score(model, tokenizer, pairs)]).reshape(len(samples), -1)
        hits.append((logs.argmax(1) == right).mean())
    chance = np.mean([1 / len(sample.options) for sample in samples])
    return f"chance {chance:.1%}, by the option's text {hits[0]:.1%}, by its letter {hits[1]:.1%}"


def _words(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> str:
    scored = _score(model, tokenizer, [(_chat(sample.question), sample.answer) for sample in samples])
    exact = np.mean([likeliest for _, likeliest in scored])
    return f"exact {exact:.1%}, nats an answer {-np.mean([sum(log) for log, _ in scored]):.2f}"


def _prose(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> str:
    scored = _score(model, tokenizer, [(s.question or _DOCUMENT_START, s.answer) for s in samples])
    tokens = [value for log, _ in scored for value in log]
    return f"{len(tokens)} tokens, {-np.mean(tokens):.3f} nats a token"


@torch.inference_mode()
def _score(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[float], bool]]:
    """For each prompt and continuation: the log-probabilities of its tokens, and whether all of them are likeliest."""
    rows = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair] for pair in pairs]
    order = sorted(range(len(rows)), key=lambda index: sum(map(len, rows[index])))
    found: list[tuple[list[float], bool]] = [([], False)] * len(rows)
    for start in range(0, len(order), _BATCH):
        chunk = order[start : start + _BATCH]
        longest = max(sum(map(len, rows[index])) for index in chunk)
        # Padded on the right, which causal attention never looks at.
        ids = torch.zeros(len(chunk), longest, dtype=torch.long)
        for row, index in enumerate(chunk):
            prompt, answer = rows[index]
            ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        states = model.model(input_ids=ids).last_hidden_state
        for row, index in enumerate(chunk):
            prompt, answer = rows[index]
            logits = model.lm_head(states[row, len(prompt) - 1 : len(prompt) + len(answer) - 1]).float()
            right = torch.tensor(answer)
            logs = F.log_softmax(logits, -1).gather(1, right[:, None])[:, 0]
            found[index] = (logs.tolist(), bool((logits.argmax(-1) == right).all()))
    return found


def _chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


if __name__ == "__main__":
    main()
