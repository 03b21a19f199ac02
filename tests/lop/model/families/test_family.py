"""What every family of the registry promises, and that no two of them get into each other's way."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from lop.model.families.family import Family
from lop.model.families.registry import FAMILIES

PROJECTION = "layers.3.mlp.down_proj.weight"
# As checkpoints name tensors before transformers 4.52, since then, and as transformers 5 does in memory.
SCHEMES = {
    f"model.{PROJECTION}": f"model.language_model.{PROJECTION}",
    f"language_model.{PROJECTION}": f"model.language_model.{PROJECTION}",
    f"model.language_model.{PROJECTION}": f"model.language_model.{PROJECTION}",
    "visual.blocks.2.norm1.weight": "model.visual.blocks.2.norm1.weight",
    "model.visual.blocks.2.norm1.weight": "model.visual.blocks.2.norm1.weight",
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "lm_head.weight": "lm_head.weight",
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def flat_config(family: Family) -> dict[str, object]:
    """As the published checkpoints have it, shortened."""
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": 64,
        "intermediate_size": 128,
        "image_token_id": 6,
        "eos_token_id": 2,
        "vision_config": {"in_chans": 3},
    }


def test_it_is_found_by_its_model_type(family: Family) -> None:
    assert FAMILIES[family.model_type] is family


def test_tensors_old_and_new_are_those_of_the_network(family: Family) -> None:
    assert {name: family.parameter(name) for name in SCHEMES} == SCHEMES
    assert {family.ffn_tensor(name) for name in SCHEMES if PROJECTION in name} == {(3, "down_proj")}
    towers = [name for name in SCHEMES if "visual" in name]
    assert [name for name in SCHEMES if family.is_tower(name)] == towers
    assert {family.tower_block(name) for name in towers} == {2}


def test_an_ffn_of_the_tower_is_not_pruned(family: Family) -> None:
    assert family.ffn_tensor("visual.layers.3.mlp.down_proj.weight") is None


@pytest.mark.parametrize("name", SCHEMES)
def test_a_name_means_the_same_in_all_families(name: str) -> None:
    known = {found for family in FAMILIES.values() if (found := family.ffn_tensor(name))}
    assert len(known) <= 1


def test_a_flat_config_is_the_text_and_more(family: Family) -> None:
    flat = flat_config(family)
    text = family.text_config(flat)
    assert text == {
        "model_type": f"{family.model_type}_text",
        "hidden_size": 64,
        "intermediate_size": 128,
        "eos_token_id": 2,
    }
    assert family.text_config({**flat, "text_config": text}) == text


def test_what_a_config_leaves_out_of_the_tower_is_as_transformers_has_it(family: Family) -> None:
    built = AutoConfig.for_model(family.model_type).vision_config
    for said in ({}, {"vision_config": None}, {"vision_config": {"depth": None}}):
        for name, value in family.vision_config(said).items():
            found = getattr(built, name)
            assert (list(found) if isinstance(found, tuple) else found) == value
    said = {"vision_config": {"depth": 7, "in_chans": 3}}
    assert family.vision_config(said) == {**family.vision_config({}), **said["vision_config"]}


def test_what_is_computed_otherwise_is_refused(family: Family) -> None:
    flat = flat_config(family)
    assert family.refusal(flat) is None
    for change in ({"hidden_act": "gelu"}, {"use_sliding_window": True}):
        (name,) = change
        for config in ({**flat, **change}, {**flat, "text_config": change}):
            assert name in str(family.refusal(config))


def test_the_pruned_class_is_the_dense_one_in_a_file_that_needs_no_lop(family: Family) -> None:
    pruned = family.network_class()
    assert pruned.__name__ == family.pruned_class
    assert pruned.__bases__[0].__name__ == family.architecture
    assert " lop" not in Path(sys.modules[family.modeling].__file__ or "").read_text()


def test_modelling_files_differ_in_names_alone() -> None:
    """What is mended in one is mended in all."""
    texts = set()
    for family in FAMILIES.values():
        network_class = family.network_class()
        text = Path(sys.modules[family.modeling].__file__ or "").read_text()
        prefix = family.architecture.removesuffix("ForConditionalGeneration")
        assert network_class.config_class.__name__ == f"{prefix}Config"
        texts.add(text.replace(prefix, "X").replace(f"{family.name} whose", "X whose").replace(family.name + ":", "X:"))
    assert len(texts) == 1


def test_the_registry_loads_no_torch() -> None:
    code = "import sys, lop.model.find; assert not {'torch', 'transformers'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
