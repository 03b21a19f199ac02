"""The tokenizer in GGUF's keys: tokens, merges, and by which rules llama.cpp cuts text before it merges."""

from pathlib import Path
from typing import Any

from lop.errors import LopError
from lop.storage.files import read_json

# What `tokenizer.json` of the published Qwen2.5-VL splits by, and llama.cpp's "qwen2", too.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = ("bos", "eos", "unk", "pad")


def add_tokenizer(writer: Any, source: Path, vocabulary: int) -> None:
    """Writes the tokenizer's keys.

    llama.cpp's own converter tells tokenizers by a hash of what they answer; here it is told from what they do, so that
    models with tokenizers of their own have their place, too.

    Args:
        writer: gguf's.
        source: the checkpoint's folder.
        vocabulary: rows of the embeddings; those without a token are marked as unused.

    Raises:
        LopError: there is no `tokenizer.json`, or llama.cpp knows no such tokenizer.
    """
    from gguf import SpecialVocab, TokenType

    file = source / "tokenizer.json"
    if not file.is_file():
        raise LopError(f"{source} has no tokenizer.json, which a GGUF file's tokenizer is made from")
    tokenizer = read_json(file)
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise LopError(f"{file} is a tokenizer of type {model.get('type')!r}, and llama.cpp's qwen2vl takes bytes' BPE")
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [TokenType.UNUSED] * vocabulary
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, TokenType.NORMAL
    for added in tokenizer.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    special = SpecialVocab(source, load_merges=True, n_vocab=vocabulary, special_token_types=_SPECIAL)
    # Without one llama.cpp takes whatever token is number 11 for it; Qwen2.5-VL begins with none, either.
    ids = special.special_token_ids
    ids.setdefault("bos", ids.get("pad", ids.get("eos", 0)))
    special.add_special_token.setdefault("bos", False)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter(tokenizer, file))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)


def splitter(tokenizer: dict[str, Any], file: Path) -> str:
    """What llama.cpp calls the rule by which a tokenizer cuts text.

    Raises:
        LopError: it knows none that is the same.
    """
    before = tokenizer.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    known: dict[tuple[str | None, ...], str] = {
        ("bytes",): "gpt-2",
        ("digits", "bytes"): "smollm",
        ("qwen2", "plain"): "qwen2",
    }
    found = known.get(tuple(map(_step, steps)))
    if found is None:
        raise LopError(f"{file} cuts text in a way that llama.cpp is not known to have: {before}")
    return found


def _step(step: dict[str, Any]) -> str | None:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return "bytes"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return "plain"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": pattern}} if pattern == _QWEN2:
            return "qwen2"
    return None
