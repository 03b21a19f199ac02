"""`smol`'s shape, tokenizer and processor: the checkpoint's files beside its weights.

    python -m training.smol.architecture [--out FOLDER]

The language model's numbers, its tokenizer and the form of its chats come from the GGUF file.
"""

import argparse
import json
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from lop.model.find import assets
from lop.model.smol import NAME, find_source
from training.tiny.architecture import MERGE, PATCH, PIXELS, TEMPLATE

# As Qwen2.5-VL names them, in the order of the rows that they add to the embedding.
TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
MROPE = (8, 12, 12)


def make_tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """The language model's own tokenizer with the tokens for images at the end."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers forgets that this vocabulary (`tokenizer.ggml.pre` is "smollm") was made with digits apart.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
        chat_template=TEMPLATE,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
    """The ordinary processor, for images of 64×64 pixels: four image tokens each."""
    shape = {"patch_size": PATCH, "merge_size": MERGE, "size": {"shortest_edge": PIXELS, "longest_edge": PIXELS}}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**shape), tokenizer, Qwen2VLVideoProcessor(**shape), chat_template=TEMPLATE
    )


def make_config(source: Path, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """SmolLM2's numbers with the vision tower of `tiny`."""
    llama = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in TOKENS}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": llama.hidden_size,
            "intermediate_size": llama.intermediate_size,
            "num_hidden_layers": llama.num_hidden_layers,
            "num_attention_heads": llama.num_attention_heads,
            "num_key_value_heads": llama.num_key_value_heads,
            "max_position_embeddings": llama.max_position_embeddings,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": list(MROPE),
                "rope_theta": llama.rope_parameters["rope_theta"],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "use_sliding_window": False,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": llama.hidden_size,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "window_size": 64,
            "fullatt_block_indexes": [0, 1, 2, 3],
        },
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="bfloat16",
    )


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=assets(NAME) / "model")
    options = parser.parse_args()
    source = find_source()
    tokenizer = make_tokenizer(source)
    make_processor(tokenizer).save_pretrained(options.out)
    make_config(source, tokenizer).save_pretrained(options.out)
    GenerationConfig(
        do_sample=False, max_new_tokens=64, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(options.out)
    # Without the indentation it is half as large.
    file = options.out / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False, separators=(",", ":")))


if __name__ == "__main__":
    main()
