"""Checkpoints with attention pruned: in transformers, padded, inspected, refused where they cannot be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForImageTextToText

import lop
from lop.checkpoint.export import convert, export, load
from lop.checkpoint.footprint import Footprint
from lop.checkpoint.inspection import inspect, print_inspection
from lop.checkpoint.recovery import recover_checkpoint, recover_elastic
from lop.errors import LopError
from lop.model.adapter import load_model
from lop.model.backbone import Group
from lop.model.elastic import ElasticModel
from lop.model.encoding import encode
from lop.model.samples import SampleSets
from lop.model.shape import read_shape
from lop.model.sources import family_of
from lop.model.tensors import group_parameters, model_size
from lop.space.allocation import Allocation, Attention, Space, dense, leanest, project, uniform
from lop.space.latency import Profile, Times
from lop.space.memory import Load
from lop.space.size import Target
from lop.storage.headers import read_tensors
from tests.groups import GROUPS, grouped_tiny, random_orders

LAYERS, NEURONS = 12, 160
# The first layer has no attention, which caches ask first; the third has nothing at all.
KEPT = (0, 1, 0, 2, *[GROUPS] * (LAYERS - 4))
ALLOCATION = Allocation((96, 160, 0, *[80] * (LAYERS - 3), *KEPT))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grouped_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def orders() -> dict[str, np.ndarray]:
    return random_orders(LAYERS, NEURONS)


def exported(source: Path, out: Path, orders: dict[str, np.ndarray], **options: Any) -> dict[str, Any]:
    about = {"source": "grouped", "target": 0.5}
    return export(source, out, ALLOCATION, orders["order"], about=about, groups=orders["groups"], **options)


@pytest.fixture(scope="module")
def checkpoint(source: Path, orders: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "hf"
    exported(source, out, orders)
    return out


PROMPT = torch.tensor([[11, 45, 260, 31, 94, 17]])


def logits(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = network(input_ids=PROMPT).logits
    return found


def test_the_checkpoint_says_what_the_elastic_model_said(
    source: Path, checkpoint: Path, orders: dict[str, np.ndarray], samples: SampleSets
) -> None:
    model = load_model(source, dtype="float32")
    elastic = ElasticModel(model, orders["order"], groups=orders["groups"])
    elastic.prune(ALLOCATION)
    pruned = load_model(checkpoint, dtype="float32")
    encoded = encode(pruned, samples.reward[:24], batch_tokens=600)
    with torch.inference_mode():
        for batch in encoded.batches:
            ours, theirs = (
                list(backbone.hidden(batch.embeddings, batch.rotation, batch.groups))[-1]
                for backbone in (elastic.backbone, pruned.lean_backbone())
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_transformers_computes_it_without_lop_installed(checkpoint: Path) -> None:
    network = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32)
    pruned = load_model(checkpoint, dtype="float32")
    length = PROMPT.shape[1]
    backbone, positions = pruned.lean_backbone(), torch.arange(length).expand(3, length)
    states = pruned.token_embeddings(PROMPT[0])
    groups = [Group(count=1, length=length, tail=1)]
    *_, after = backbone.hidden(states, pruned.rotation(positions), groups)
    torch.testing.assert_close(logits(network)[0], backbone.logits(backbone.normed(after)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_are_written_with_a_cache_as_without_one(checkpoint: Path, attention: str) -> None:
    network = load(checkpoint, dtype="float32")
    network.set_attn_implementation(attention)
    with torch.inference_mode():
        cached = network.generate(input_ids=PROMPT, max_new_tokens=6, do_sample=False, use_cache=True)
        whole = network.generate(input_ids=PROMPT, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, whole)
    assert cached.shape[1] > PROMPT.shape[1]


def test_zeros_in_the_place_of_heads_are_the_same_function(
    source: Path, checkpoint: Path, orders: dict[str, np.ndarray], tmp_path: Path
) -> None:
    exported(source, tmp_path / "padded", orders, format="padded")
    padded = load(tmp_path / "padded", dtype="float32")
    assert type(padded).__name__ in (family_of(source).architecture, family_of(source).pruned_class)
    torch.testing.assert_close(logits(padded), logits(load(checkpoint, dtype="float32")), rtol=1e-3, atol=1e-3)
    assert inspect(tmp_path / "padded").groups == KEPT


def test_what_transformers_saves_again_opens_again(checkpoint: Path, tmp_path: Path) -> None:
    network = load(checkpoint, dtype="float32")
    network.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", dtype="float32")
    assert torch.equal(logits(network), logits(again))
    found = inspect(tmp_path / "again")
    assert (found.groups, found.dense_groups, found.format) == (KEPT, GROUPS, "hf")


def test_inspection_shows_both_parts(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = lop.inspect(checkpoint)
    assert (found.widths, found.groups, found.dense_groups) == (ALLOCATION.widths[:LAYERS], KEPT, GROUPS)
    assert not found.damage
    print_inspection(found)
    shown = capsys.readouterr().out
    assert f"{sum(KEPT)} of {LAYERS} layers' {GROUPS} groups each" in shown
    assert "groups of attention heads" in (checkpoint / "README.md").read_text()


def test_refitted_weights_ship_as_they_are_in_the_elastic_model(
    source: Path, orders: dict[str, np.ndarray], samples: SampleSets, tmp_path: Path
) -> None:
    calibration = samples.calibration[:64]
    means = np.zeros((LAYERS, NEURONS))
    recovered = recover_checkpoint(
        source, ALLOCATION, "refit", tmp_path, **orders, means=means, samples=calibration, batch_tokens=600,
        dtype="float32",
    )  # fmt: skip
    exported(source, tmp_path / "hf", orders, recovered=recovered)
    elastic = ElasticModel(load_model(source, dtype="float32"), orders["order"], groups=orders["groups"])
    pruned = load_model(tmp_path / "hf", dtype="float32")
    encoded = encode(pruned, calibration, batch_tokens=600)
    dense_states = [_states(elastic.backbone, encoded)]
    for recovery in ("none", "refit"):
        recover_elastic(elastic, ALLOCATION, recovery, means=means, calibration=encoded)
        dense_states.append(_states(elastic.backbone, encoded))
    whole, plain, refitted = dense_states
    torch.testing.assert_close(_states(pruned.lean_backbone(), encoded), refitted, rtol=0.05, atol=0.05)  # In bfloat16.
    assert (refitted - whole).norm() < 0.8 * (plain - whole).norm()


def _states(backbone: Any, encoded: Any) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([list(backbone.hidden(b.embeddings, b.rotation, b.groups))[-1] for b in encoded.batches])


def test_what_a_checkpoint_weighs_is_known_before(source: Path, checkpoint: Path) -> None:
    tensors = read_tensors(source)
    size = model_size(tensors)
    attention = Attention(GROUPS, group_parameters(tensors, GROUPS), size.neuron_parameters)
    space = Space(LAYERS, NEURONS, 8, 0.95, None, attention, vanishing=True)
    footprint = Footprint(size, attention=attention)
    found = inspect(checkpoint)
    assert footprint.parameters(ALLOCATION.widths) == found.parameters
    assert footprint.bytes(ALLOCATION.widths) == found.bytes
    most = footprint.bytes(dense(space).widths)
    for asked in (most, most - 100_000, most - 777_777):
        chosen = footprint.allocate(Target(bytes=asked), space, lambda budget: project([0.3] * 24, space, budget))
        missing = max(part.cost * part.step for part in space.parts) * (size.neuron_bytes // size.neuron_parameters)
        assert asked - missing < footprint.bytes(chosen.widths) <= asked


def test_padded_heads_are_kept_and_all_layers_alike(
    source: Path, orders: dict[str, np.ndarray], tmp_path: Path
) -> None:
    tensors = read_tensors(source)
    size = model_size(tensors)
    attention = Attention(GROUPS, group_parameters(tensors, GROUPS), size.neuron_parameters)
    space = Space(LAYERS, NEURONS, 8, 0.95, None, attention, vanishing=True)
    footprint = Footprint(size, "padded", shape=read_shape(source, 2), attention=attention)
    whole, load = dense(space).widths, Load(context=64)
    times = Times(1e-3, 2e-3, 1e-3, (0, NEURONS), (0.0, 9e-3), (0, GROUPS), (0.0, 1e-3))
    profile = Profile("model", LAYERS, NEURONS, "a device", {}, {"decode": times, "prefill": times}, {})
    for target in (
        Target(bytes=footprint.bytes(whole) * 9 // 10),
        Target(parameters=footprint.parameters(whole) * 9 // 10),
        Target(memory=footprint.memory(whole, load) * 9 // 10, load=load),
        Target(latency=times.of(whole[:LAYERS]) * 0.9, profile=profile),
    ):
        chosen = footprint.allocate(target, space, lambda budget: leanest(space))
        width = chosen.widths[0]
        assert chosen.widths == (width,) * LAYERS + (GROUPS,) * LAYERS
        assert footprint.meets(target, chosen.widths, space)
        assert not footprint.meets(target, (width + 8,) * LAYERS + (GROUPS,) * LAYERS, space)


def test_a_latency_counts_the_groups_that_are_kept(source: Path) -> None:
    tensors = read_tensors(source)
    size = model_size(tensors)
    attention = Attention(GROUPS, group_parameters(tensors, GROUPS), size.neuron_parameters)
    space = Space(LAYERS, NEURONS, 8, 0.95, None, attention, vanishing=True)
    footprint = Footprint(size, attention=attention)
    times = Times(3e-3, 2e-3, 1e-3, (0, 40, NEURONS), (0.0, 5e-3, 9e-3), (0, 1, GROUPS), (0.0, 2e-3, 3e-3))
    profile = Profile("model", LAYERS, NEURONS, "a device", {}, {"decode": times, "prefill": times}, {})

    def predict(budget: int) -> Allocation:
        return project(np.random.default_rng(budget).normal(0.5, 1, 2 * LAYERS), space, budget)

    for share in (0.2, 0.5, 0.8, 0.95):
        asked = share * times.of(dense(space).widths[:LAYERS])
        target = Target(latency=asked, profile=profile)
        chosen = footprint.allocate(target, space, predict)
        told = footprint.describe(chosen, space, target)["latency"]
        assert told == times.of(chosen.widths[:LAYERS], chosen.widths[LAYERS:]) <= asked
        # None of the budgets above gives anything that would do.
        step = space.parts[0].cost * 8
        above = range(space.cost(chosen.widths) + 2 * step, space.whole, step)
        costs = [predict(space.least + (budget - space.least) // step * step).widths for budget in above]
        assert all(times.of(widths[:LAYERS], widths[LAYERS:]) > asked for widths in costs)
    assert times.of([0] * LAYERS, [0] * LAYERS) == pytest.approx(3e-3)  # What is skipped costs nothing.


def test_memory_counts_the_cache_of_the_groups_that_are_kept(source: Path) -> None:
    tensors = read_tensors(source)
    size, load = model_size(tensors), Load(context=256, batch=4)
    attention = Attention(GROUPS, group_parameters(tensors, GROUPS), size.neuron_parameters)
    space = Space(LAYERS, NEURONS, 8, 0.95, None, attention, vanishing=True)
    footprint = Footprint(size, shape=read_shape(source, 2), attention=attention)
    whole, less = Allocation((80,) * LAYERS + (GROUPS,) * LAYERS), Allocation((80,) * LAYERS + (1,) * LAYERS)
    lost = 2 * LAYERS
    saved = 2 * lost * (attention.group_parameters + 2 * 24 * load.context * load.batch)
    assert footprint.memory(whole.widths, load) - footprint.memory(less.widths, load) == saved
    kept = []
    for share in (0.95, 0.8, 0.7):
        asked = int(share * footprint.memory(dense(space).widths, load))
        chosen = footprint.allocate(Target(memory=asked, load=load), space, lambda budget: uniform(space, budget))
        assert footprint.memory(chosen.widths, load) <= asked
        kept.append(space.cost(chosen.widths))
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 3


def test_attention_that_keeps_all_is_left_as_it_is(source: Path, orders: dict[str, np.ndarray], tmp_path: Path) -> None:
    allocation = Allocation((80,) * LAYERS + (GROUPS,) * LAYERS)
    manifest = export(source, tmp_path / "hf", allocation, orders["order"], about={}, groups=orders["groups"])
    assert "groups" not in manifest
    (theirs, ours) = (read_tensors(folder) for folder in (source, tmp_path / "hf"))
    assert all(theirs[name].shape == info.shape for name, info in ours.items() if "self_attn" in name)


def test_what_does_not_go_with_it_is_refused_before(source: Path) -> None:
    tensors = read_tensors(source)
    with pytest.raises(LopError, match="all heads in all layers: with attention pruned take 'gguf-q8_0'"):
        Footprint(model_size(tensors), "gguf-true-q8_0", attention=Attention(GROUPS, 100, 200))


@pytest.mark.parametrize("form", ["gguf", "gguf-q8_0"])
def test_llama_cpp_gets_zeros_in_the_place_of_heads(
    form: str, source: Path, checkpoint: Path, orders: dict[str, np.ndarray], tmp_path: Path
) -> None:
    exported(source, tmp_path / "padded", orders, format="padded")
    convert(tmp_path / "padded", tmp_path / "converted", format=form)
    manifest = exported(source, tmp_path / "direct", orders, format=form)
    language = manifest["gguf"]["files"][0]
    theirs, ours = (
        {tensor.name: tensor for tensor in GGUFReader(tmp_path / name / language).tensors}
        for name in ("converted", "direct")
    )
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[name].data, ours[name].data) for name in ours)
    assert list(ours["blk.1.attn_output.weight"].shape) == [72, 72]
    assert inspect(tmp_path / "direct").groups == KEPT
    assert "of its attention pruned" in (tmp_path / "direct" / "README.md").read_text()
    size, tensors = model_size(read_tensors(source)), read_tensors(source)
    attention = Attention(GROUPS, group_parameters(tensors, GROUPS), size.neuron_parameters)
    told = Footprint(size, form, source=source, attention=attention)
    assert told.bytes(ALLOCATION.widths) == manifest["gguf"]["bytes"]


def test_a_checkpoint_without_those_heads_is_not_converted(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(LopError, match="prune the dense model again, to 'gguf'"):
        convert(checkpoint, tmp_path / "out", format="gguf-true")
    assert not (tmp_path / "out").exists()
