"""Trains one member of the zoo, with `tiny`'s eyes and words turned into its own space."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from lop.model.find import EMBEDDED, find_model
from training.tiny import vision
from training.tiny.architecture import make_processor, save
from training.tiny.corpus import Corpus, make_questions
from training.tiny.images import products, shapes
from training.tiny.train import new_model, train_language
from training.zoo.members import Member

_RENDERINGS, _PRODUCTS, _QUESTIONS, _IMAGES = 16, 4000, 60_000, 16


def train_member(member: Member, work: Path, *, device: str = "cpu") -> Path:
    """The member's checkpoint, a folder of `work`; interrupted, training goes on from its last state.

    Args:
        device: where its language is trained.
    """
    folder = work / member.name
    if (folder / "config.json").exists():
        return folder
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model, tokenizer = new_model(member.seed, member.shape)
    tiny = Qwen2_5_VLForConditionalGeneration.from_pretrained(find_model(EMBEDDED), dtype=torch.float32)
    turn = _borrow(model, tiny, member.seed)
    seen = _seen(tiny, work)
    corpus = Corpus((seen.tokens.float() @ turn.T).bfloat16(), seen.starts, seen.pictures)
    state = work / f"{member.name}.pt"
    train_language(
        0,
        model.to(device),
        corpus,
        make_questions(tokenizer, corpus, _QUESTIONS, member.seed, member.shares),
        state,
        steps=member.steps,
        seed=member.seed,
        processes=1,
        images=_IMAGES,
    )
    save(model.to("cpu", torch.bfloat16), make_processor(tokenizer), folder)
    state.unlink()
    return folder


@torch.no_grad()
def _borrow(model: Qwen2_5_VLForConditionalGeneration, tiny: Qwen2_5_VLForConditionalGeneration, seed: int) -> Tensor:
    """Gives a new model the eyes and words of `tiny` by a random turn [H, H of tiny], which it returns.

    A turn keeps all lengths and angles; into fewer dimensions it keeps what the words differ most by.
    """
    table = tiny.get_input_embeddings().weight
    wide = model.get_input_embeddings().weight.shape[1]
    kept = torch.linalg.svd(table, full_matrices=False).Vh[:wide]
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(wide, len(kept), generator=generator))[0] @ kept
    model.get_input_embeddings().weight.copy_(table @ turn.T)
    state = tiny.model.visual.state_dict()
    last = "merger.mlp.2"
    state |= {f"{last}.weight": turn @ state[f"{last}.weight"], f"{last}.bias": turn @ state[f"{last}.bias"]}
    model.model.visual.load_state_dict(state)
    return turn


def _seen(tiny: Qwen2_5_VLForConditionalGeneration, work: Path) -> Corpus:
    """What `tiny` sees in the training images: once for the whole zoo."""
    path = work / "seen.pt"
    if not path.exists():
        pictures = (
            list(shapes("train")),
            list(products("train"))[:_PRODUCTS],
            vision.flag_pictures(1000, _RENDERINGS),
        )
        torch.save(Corpus.embed(tiny, pictures).state(), path)
    return Corpus(**torch.load(path, weights_only=False))
