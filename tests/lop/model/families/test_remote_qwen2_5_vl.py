"""The pruned class in transformers' public calls: each does what it does on the plain class, padded to one width."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from lop.model.families.remote_qwen2_5_vl import LopQwen2_5_VLForConditionalGeneration as Pruned

WIDTHS = (24, 7, 40)
NEURONS = 40
VOCABULARY = 50
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def small_config(widths: tuple[int, ...] | None = WIDTHS, **text: Any) -> Any:
    layers = {str(layer): {"intermediate_size": width} for layer, width in enumerate(widths or ())}
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": NEURONS,
            "num_hidden_layers": len(WIDTHS),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 128,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            **({"per_layer_config": layers} if widths else {}),
            **text,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "spatial_merge_size": 1,
        },
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )


@pytest.fixture
def pruned() -> Pruned:
    torch.manual_seed(0)
    return Pruned(small_config(initializer_range=0.3)).eval()


@pytest.fixture
def padded(pruned: Pruned) -> Any:
    """transformers' own class with the same weights, filled up with zeros: what the pruned one must equal."""
    model = Qwen2_5_VLForConditionalGeneration(small_config(None)).eval()
    for (name, wide), narrow in zip(model.named_parameters(), pruned.parameters(), strict=True):
        with torch.no_grad():
            wide.zero_()
            wide[tuple(slice(size) for size in narrow.shape)] = narrow
        assert wide.shape == narrow.shape or ".mlp." in name
    return model


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Two sequences, the first one padded on the left."""
    ids = torch.randint(7, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(ids)}


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[real tokens, V]."""
    with torch.inference_mode():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def test_all_modules_share_the_configs_that_the_model_has(pruned: Pruned) -> None:
    text = pruned.model.language_model
    assert pruned.model.config is pruned.config
    assert text.config is pruned.config.text_config
    kept = [module.config for module in text.modules() if hasattr(module, "config")]
    assert len(kept) > 2 * len(WIDTHS)
    assert all(config is text.config for config in kept)


@pytest.mark.parametrize("first", ["sdpa", "eager"])
def test_attention_implementations_can_be_changed_at_any_time(
    first: str, pruned: Pruned, padded: Any, inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    pruned.save_pretrained(tmp_path)
    loaded = Pruned.from_pretrained(tmp_path, attn_implementation=first).eval()
    expected = logits(padded, inputs)
    later = {**inputs, "input_ids": inputs["input_ids"].clone()}
    later["input_ids"][:, -2:] = 8
    for name in (first, "eager", "sdpa", "eager", "sdpa"):
        loaded.set_attn_implementation(name)
        torch.testing.assert_close(logits(loaded, inputs), expected, **CLOSE)
        with torch.inference_mode():
            before, after = (loaded(**given).logits[1, :-2] for given in (inputs, later))
        torch.testing.assert_close(before, after, msg=f"not causal with {name}", **CLOSE)


def test_attentions_and_hidden_states_are_those_of_the_plain_class(
    pruned: Pruned, padded: Any, inputs: dict[str, torch.Tensor]
) -> None:
    outputs = []
    for model in (pruned, padded):
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            outputs.append(model(**inputs, output_attentions=True, output_hidden_states=True))
    ours, theirs = outputs
    assert len(ours.attentions) == len(WIDTHS)
    assert len(ours.hidden_states) == len(WIDTHS) + 1
    for mine, expected in zip(ours.attentions + ours.hidden_states, theirs.attentions + theirs.hidden_states):
        torch.testing.assert_close(mine, expected, **CLOSE)
    assert all(attention[1].triu(1).abs().max() == 0 and attention[1].sum() > 0 for attention in ours.attentions)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_plain_class(
    checkpointing: bool, pruned: Pruned, padded: Any, inputs: dict[str, torch.Tensor]
) -> None:
    losses = []
    for model in (pruned, padded):
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses, **CLOSE)
    for name, narrow in pruned.named_parameters():
        wide = padded.get_parameter(name).grad
        if wide is None:
            assert narrow.grad is None
            continue
        torch.testing.assert_close(narrow.grad, wide[tuple(slice(size) for size in narrow.shape)], **CLOSE)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_a_cache(
    cache: str | None, pruned: Pruned, padded: Any, inputs: dict[str, torch.Tensor]
) -> None:
    options = {"max_new_tokens": 6, "do_sample": False}
    kept = pruned.generate(**inputs, **options, cache_implementation=cache, disable_compile=True)
    assert torch.equal(kept, padded.generate(**inputs, **options, use_cache=False))


def test_resized_saved_and_loaded_again(pruned: Pruned, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    before = logits(pruned, inputs)
    pruned.resize_token_embeddings(VOCABULARY + 14, mean_resizing=False)
    torch.testing.assert_close(logits(pruned, inputs)[:, :VOCABULARY], before, **CLOSE)
    pruned.save_pretrained(tmp_path)
    loaded = Pruned.from_pretrained(tmp_path).eval()
    assert [layer.mlp.down_proj.in_features for layer in loaded.model.language_model.layers] == list(WIDTHS)
    assert loaded.config.text_config.vocab_size == VOCABULARY + 14
    assert torch.equal(logits(loaded, inputs), logits(pruned, inputs))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_complete_and_their_own(again: Any, pruned: Pruned, inputs: dict[str, torch.Tensor]) -> None:
    before = logits(pruned, inputs)
    other = again(pruned)
    other.set_attn_implementation("eager")
    torch.testing.assert_close(logits(other, inputs), before, **CLOSE)
    assert pruned.config.text_config._attn_implementation == "sdpa"
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert torch.equal(logits(pruned, inputs), before)


def test_it_compiles_as_one_graph(pruned: Pruned, inputs: dict[str, torch.Tensor]) -> None:
    text, embeddings = pruned.model.language_model, pruned.get_input_embeddings()(inputs["input_ids"]).detach()
    compiled = torch.compile(text, backend="eager", fullgraph=True)
    with torch.no_grad():
        found, expected = (model(inputs_embeds=embeddings, use_cache=False)[0] for model in (compiled, text))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("has_bias", [False, True])
def test_what_is_built_starts_as_transformers_starts_and_leaves_the_config_alone(has_bias: bool) -> None:
    config = small_config(initializer_range=0.001, dtype="bfloat16", down_proj_bias=has_bias)
    before = config.to_dict()
    model = Pruned(config)
    assert config.to_dict() == before
    assert model.config is config
    for layer, width in zip(model.model.language_model.layers, WIDTHS, strict=True):
        assert layer.mlp.intermediate_size == width
        for name, part in layer.mlp.named_parameters():
            assert part.dtype == torch.bfloat16
            assert part.abs().max() < 0.01, name
        assert (layer.mlp.down_proj.bias is not None) == has_bias


def test_a_model_that_cannot_be_built_leaves_the_widths_in_the_config() -> None:
    config = small_config()
    config.text_config.hidden_size = -1
    with pytest.raises(RuntimeError):
        Pruned(config)
    assert [layer.intermediate_size for layer in config.text_config.per_layer_config] == list(WIDTHS)
