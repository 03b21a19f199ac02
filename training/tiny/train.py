"""Trains the embedded model: first its eyes, then its language, then writes the checkpoint.

    python -m training.tiny.train --work WORK [--steps N] [--neurons N --out FOLDER]

Seeded; interrupted, the same command goes on from the last checkpoint in WORK.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from training.tiny import vision
from training.tiny.architecture import TINY, BackboneShape, make_config, make_processor, make_tokenizer, save
from training.tiny.backbone import hidden_states
from training.tiny.corpus import Corpus, Questions, make_questions
from training.tiny.questions import vocabulary

_RENDERINGS = 100
_QUESTIONS = 500_000
_READING = 0.2
_VERDICT = 0.5
_MATCHING = 0.8


def main() -> None:
    """Parses the command line and runs both stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints and caches are kept")
    parser.add_argument("--out", type=Path, default=Path("lop/assets/tiny/model"), help="the checkpoint's folder")
    parser.add_argument("--vision-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=3600, help="language steps of about 256 questions")
    parser.add_argument(
        "--neurons", type=int, default=TINY.neurons, help="of each FFN, in other models than what ships"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.processes)
    model, tokenizer = new_model(options.seed, replace(TINY, neurons=options.neurons))
    corpus = _see(model, tokenizer, options)
    _questions(tokenizer, corpus, options)
    with TemporaryDirectory() as meeting:
        multiprocessing.spawn(_speak, (options, f"file://{meeting}/point"), options.processes)
    state = torch.load(options.work / "language.pt", weights_only=False)
    model.model.language_model.load_state_dict(state["backbone"])
    save(model.to(torch.bfloat16), make_processor(tokenizer), options.out)


def new_model(
    seed: int, shape: BackboneShape = TINY
) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast]:
    """The untrained model and its tokenizer; a word has one vector, at the start of an answer and inside a text."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(vocabulary())
    model = Qwen2_5_VLForConditionalGeneration(make_config(tokenizer, shape))
    table = model.get_input_embeddings().weight.data
    # At transformers' 0.02 the first layers' outputs would drown what is seen and said.
    table.mul_(5)
    words = tokenizer.get_vocab()
    for word, index in words.items():
        if word.startswith("Ġ") and word[1:] in words:
            table[words[word[1:]]] = table[index]
    _match(model)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            # At transformers' 0.02 most neurons stay idle for good; at this scale all of them take part.
            layer.mlp.gate_proj.weight.mul_(5)
            layer.mlp.up_proj.weight.mul_(5)
            # What heads find has to be heard over what neurons say.
            layer.self_attn.v_proj.weight.mul_(3)
            layer.self_attn.o_proj.weight.mul_(3)
    return model, tokenizer


@torch.no_grad()
def _match(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Lets one head of each layer start out looking for its own kind: its queries and keys are the same projection.

    Yes or no, and an option's letter, depend on whether a word equals what was seen or recalled; heads that find equal
    vectors would otherwise take thousands of steps to come about.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        size = attention.head_dim
        rows = torch.linalg.qr(torch.randn(attention.k_proj.in_features, size))[0].T * _MATCHING
        attention.k_proj.weight[-size:] = rows
        attention.q_proj.weight[-2 * size : -size] = rows


def _speak(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """One process of the language stage."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=options.processes)
    model, tokenizer = new_model(options.seed, replace(TINY, neurons=options.neurons))
    corpus = _see(model, tokenizer, options)
    questions = _questions(tokenizer, corpus, options)
    train_language(
        rank,
        model,
        corpus,
        questions,
        options.work / "language.pt",
        steps=options.steps,
        seed=options.seed,
        processes=options.processes,
    )
    distributed.destroy_process_group()


def _see(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace
) -> Corpus:
    """Trains the tower, or takes it from the work folder, and embeds all training images once."""
    done = options.work / "tower.pt"
    cached = options.work / "features.pt"
    if not (done.exists() and cached.exists()):
        pictures = vision.training_pools(_RENDERINGS)
        pools = [vision.Pool(part) for part in pictures]
        vision.train_vision(
            model, tokenizer, pools, options.work / "vision.pt", steps=options.vision_steps, seed=options.seed
        )
        vision.rescale(model, pools[2])
        torch.save(model.model.visual.state_dict(), done)
        torch.save(Corpus.embed(model, pictures).state(), cached)
    model.model.visual.load_state_dict(torch.load(done, weights_only=True))
    return Corpus(**torch.load(cached, weights_only=False))


def _questions(tokenizer: PreTrainedTokenizerFast, corpus: Corpus, options: argparse.Namespace) -> Questions:
    cached = options.work / "questions.pt"
    if not cached.exists():
        torch.save(vars(make_questions(tokenizer, corpus, _QUESTIONS, options.seed)), cached)
    return Questions(**torch.load(cached, weights_only=False))


def train_language(
    rank: int,
    model: Qwen2_5_VLForConditionalGeneration,
    corpus: Corpus,
    questions: Questions,
    checkpoint: Path,
    *,
    steps: int,
    seed: int,
    processes: int,
    rate: float = 2e-3,
    images: int = 32,
) -> None:
    """Trains the backbone in place on cached image tokens; the loss counts the answers only.

    It computes where the model is; questions and image tokens stay in the host's memory. Every process takes its share
    of each batch, and gradients are averaged: at this size, that is faster than threads. The rate is constant between a
    short warm-up and a linear decay over the last two fifths.
    """
    backbone = model.model.language_model
    parameters = list(backbone.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    random = np.random.default_rng(seed)
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False, map_location="cpu")
        backbone.load_state_dict(state["backbone"])
        optimiser.load_state_dict(state["optimiser"])
        random.bit_generator.state = state["random"]
        step = state["step"]
    start, first = time.time(), step
    seen: dict[str, list[float]] = {}
    batches: Iterator[Tensor] = iter(())
    while step < steps:
        chosen = next(batches, None)
        if chosen is None:
            batches = questions.batches(random, images, progress=step / steps)
            continue
        chosen = chosen[rank::processes]
        loss, hits = _step(model, corpus, questions, chosen, np.random.default_rng([seed, step, rank]))
        optimiser.zero_grad()
        loss.backward()
        _average(parameters, processes)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 200, (steps - step) / (0.4 * steps))
        optimiser.step()
        step += 1
        for index, hit in zip(chosen.flatten().tolist(), hits.flatten().tolist()):
            seen.setdefault(questions.names[int(questions.group[index])], []).append(hit)
        if rank == 0 and step % 100 == 0:
            shown = " ".join(f"{name} {np.mean(values):.2f}" for name, values in sorted(seen.items()))
            pace = (time.time() - start) / (step - first)
            print(f"language {step}/{steps} {pace:.2f}s/step loss {loss.item():.3f} {shown}", flush=True)
            seen.clear()
        if rank == 0 and (step % 250 == 0 or step == steps):
            state = {
                "backbone": backbone.state_dict(),
                "optimiser": optimiser.state_dict(),
                "random": random.bit_generator.state,
                "step": step,
            }
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)


def _average(parameters: list[nn.Parameter], processes: int) -> None:
    """Makes every process's gradients their mean."""
    if processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / processes
    distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(part.view_as(gradient))


def _step(
    model: Qwen2_5_VLForConditionalGeneration,
    corpus: Corpus,
    questions: Questions,
    chosen: Tensor,
    random: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """The mean loss of the answer tokens of questions [b, K], and whether each question's answer is exactly right."""
    before = len(questions.prefix)
    lengths = questions.lengths[chosen] - before
    # Few distinct lengths: matrix kernels are prepared once for each shape.
    longest = -(-int(lengths.max()) // 4) * 4
    ids = questions.ids[chosen]
    ids = F.pad(ids, (0, max(0, before + longest - ids.shape[2])))[:, :, before : before + longest]
    embed, device = model.get_input_embeddings(), model.device
    tokens = corpus.draw(questions.seen[chosen[:, 0]], random).to(device).float()
    first = int((questions.prefix == questions.image_token).float().argmax())
    words = embed(questions.prefix.to(device)).expand(len(chosen), -1, -1)
    prefix = torch.cat([words[:, :first], tokens, words[:, first + tokens.shape[1] :]], 1)
    ids, lengths, negated = (x.to(device) for x in (ids, lengths, questions.negated[chosen]))
    asked = lengths - questions.answers[chosen].to(device)
    places = torch.arange(longest, device=device)
    is_answer = (places >= asked[..., None]) & (places < lengths[..., None])
    # True statements are read aloud too: who expects 'Paris' after 'Is the capital' finds it easy to say yes or no.
    said = ids.gather(2, asked[..., None])
    is_true = (said == questions.yes_token) & ~negated[..., None]
    is_told = is_true & (places < asked[..., None]) & (places > 0)
    row, question, column = is_answer.nonzero(as_tuple=True)
    positions = questions.positions(longest).to(device)
    states = hidden_states(model.model.language_model, prefix, embed(ids), positions)
    logits = F.linear(states[row, question, column - 1].bfloat16(), embed.weight.bfloat16()).float()
    right = ids[row, question, column]
    misses = torch.zeros(chosen.shape, device=device).index_put_(
        (row, question), (logits.detach().argmax(1) != right).float(), accumulate=True
    )
    told = F.linear(states[:, :, :-1][is_told[:, :, 1:]].bfloat16(), embed.weight.bfloat16()).float()
    reading = F.cross_entropy(told, ids[is_told], reduction="sum") / max(1, len(told))
    # The verdict is asked for at every place of the question: where the word in question stands, it is one step away.
    is_asked = ((said == questions.yes_token) | (said == questions.no_token)).squeeze(2)
    is_open = is_asked[..., None] & (places > 1) & (places < asked[..., None])
    verdicts = states[is_open] @ (embed.weight[questions.yes_token] - embed.weight[questions.no_token])
    truth = (said == questions.yes_token).expand_as(is_open)[is_open].float()
    verdict = F.binary_cross_entropy_with_logits(verdicts, truth, reduction="sum") / max(1, len(truth))
    loss = F.cross_entropy(logits, right) + _READING * reading + _VERDICT * verdict
    return loss, (misses == 0).float()


if __name__ == "__main__":
    main()
