"""Fewer bits where attention is pruned: what is in the files, what they weigh, and what they say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import lop
from lop.checkpoint.bits import QUANTISED, Packing, packing
from lop.checkpoint.compensation import compensate_checkpoint, compensated, quantised_elastic
from lop.checkpoint.export import export
from lop.checkpoint.footprint import Footprint
from lop.checkpoint.quantise import quantise
from lop.errors import LopError
from lop.model.adapter import load_model
from lop.model.elastic import ElasticModel
from lop.model.encoding import encode
from lop.model.rounding import Rounding
from lop.model.samples import SampleSets
from lop.model.sources import family_of
from lop.model.tensors import group_parameters, model_size
from lop.space.allocation import Allocation, Attention, Space, dense, leanest, project
from lop.space.size import Target
from lop.storage.headers import read_tensors
from tests.groups import GROUPS, grouped_tiny, random_orders
from tests.lop.checkpoint.test_heads import ALLOCATION, KEPT, LAYERS, NEURONS, logits

pytest.importorskip("transformers", minversion="5.24")

GROUP_COLUMNS = 24
WIDTHS = ALLOCATION.widths[:LAYERS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return grouped_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def orders() -> dict[str, np.ndarray]:
    return random_orders(LAYERS, NEURONS)


def packed(source: Path, bits: int) -> Packing:
    return packing(read_tensors(source), family_of(source), bits, granularity=8, heads=GROUP_COLUMNS)


def footprint(source: Path, bits: int, **options: Any) -> Footprint:
    tensors = read_tensors(source)
    size = model_size(tensors)
    attention = Attention(GROUPS, group_parameters(tensors, GROUPS), size.neuron_parameters)
    weight = packed(source, bits).weight(size, tensors, GROUPS)
    return Footprint(size, quantised=weight, attention=attention, **options)


def rounded(model: Any, bits: int) -> Any:
    rounding = Rounding(bits, 8)
    for module in model.model.language_model.layers.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.numel():
            weight = rounding.unpack(rounding.pack(module.weight.bfloat16()))
            module.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    return model


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("form", ["hf", "padded"])
def test_files_hold_what_is_forecast_and_say_what_rounded_weights_say(
    form: str, bits: int, source: Path, orders: dict[str, np.ndarray], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"about": {"source": "grouped"}, "groups": orders["groups"], "format": form}
    export(source, tmp_path / "plain", ALLOCATION, orders["order"], **options)
    export(source, tmp_path / "small", ALLOCATION, orders["order"], packing=packed(source, bits), **options)
    on_disk = sum(info.bytes for info in read_tensors(tmp_path / "small").values())
    assert on_disk == footprint(source, bits, format=form).bytes(ALLOCATION.widths)
    loads: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": form == "hf"}
    said = logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "small", **loads))
    expected = logits(rounded(lop.load(tmp_path / "plain", dtype="float32"), bits))
    torch.testing.assert_close(said, expected, rtol=2e-2, atol=2e-2)
    found = lop.inspect(tmp_path / "small")
    assert (found.bits, found.groups, found.damage) == (bits, KEPT, "")
    assert found.parameters == lop.inspect(tmp_path / "plain").parameters
    if form == "hf":
        quantise(tmp_path / "plain", tmp_path / "later", bits)
        later, at_once = (load_file(tmp_path / name / "model.safetensors") for name in ("later", "small"))
        assert later.keys() == at_once.keys()
        assert all(torch.equal(later[name], at_once[name]) for name in later)
        assert torch.equal(logits(lop.load(tmp_path / "later", dtype="float32")), said)


@given(
    bits=st.sampled_from(QUANTISED),
    form=st.sampled_from(["hf", "padded"]),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_a_size_is_never_exceeded(bits: int, form: str, share: float, seed: int, source: Path) -> None:
    some = footprint(source, bits, format=form)
    assert some.attention is not None
    space = Space(LAYERS, NEURONS, 8, 0.95, None, some.attention, vanishing=True)
    least, most = (some.bytes(model(space).widths) for model in (leanest, dense))
    asked = least + int(share * (most - least))

    def predict(budget: int) -> Allocation:
        return project(np.random.default_rng(seed).normal(0.4, 1, 2 * LAYERS), space, budget)

    chosen = some.allocate(Target(bytes=asked), space, predict)
    assert some.bytes(chosen.widths) <= asked
    # No more is given away than what the parts' bytes a parameter differ by, and the least that a budget tells apart.
    if form == "hf":
        assert asked - some.bytes(chosen.widths) < 0.02 * most
    with pytest.raises(LopError, match=f"with {bits} bits: {least} to {most}"):
        some.allocate(Target(bytes=least - 1), space, predict)


def test_what_is_compensated_is_scored_as_it_ships(
    source: Path, orders: dict[str, np.ndarray], samples: SampleSets, tmp_path: Path
) -> None:
    calibration, means = samples.calibration[:48], np.zeros((LAYERS, NEURONS))
    (tmp_path / "parts").mkdir()
    made = compensate_checkpoint(
        source, ALLOCATION, "refit", packed(source, 4), tmp_path / "parts", **orders, means=means,
        samples=calibration, batch_tokens=600, dtype="float32",
    )  # fmt: skip
    export(
        source, tmp_path / "hf", ALLOCATION, orders["order"], about={"source": "grouped"}, groups=orders["groups"],
        packing=packed(source, 4), packed=made,
    )  # fmt: skip
    elastic = ElasticModel(load_model(source, dtype="float32"), orders["order"], groups=orders["groups"])
    shipped = load_model(tmp_path / "hf", dtype="float32")
    encoded = encode(shipped, calibration, batch_tokens=600)
    before = states(elastic.backbone, encoded)
    said = {}
    for name, recovery, rounding in (("scored", "refit", Rounding(4, 8)), ("plain", "none", Rounding(4, 8))):
        with quantised_elastic(
            elastic, ALLOCATION, recovery, rounding, means=means, calibration=encoded, dtype=torch.bfloat16
        ):
            said[name] = states(elastic.backbone, encoded)
    torch.testing.assert_close(states(shipped.lean_backbone(), encoded), said["scored"], rtol=1e-2, atol=1e-2)
    assert (said["scored"] - before).norm() < 0.8 * (said["plain"] - before).norm()
    assert torch.equal(states(elastic.backbone, encoded), before)  # Its weights are given back.


def test_zeros_of_padding_stay_zeros(source: Path, orders: dict[str, np.ndarray], samples: SampleSets) -> None:
    elastic = ElasticModel(load_model(source, dtype="float32"), orders["order"], groups=orders["groups"])
    backbone, rounding = elastic.backbone, Rounding(4, 8)
    encoded = encode(load_model(source, dtype="float32"), samples.calibration[:8], batch_tokens=600)
    layers = list(
        compensated(
            backbone,
            backbone.layers,
            encoded,
            WIDTHS,
            rounding,
            dtype=torch.bfloat16,
            stored=[NEURONS] * LAYERS,
            groups=KEPT,
        )
    )
    for layer, parts, width, kept in zip(backbone.layers, layers, WIDTHS, KEPT, strict=True):
        assert ("o_proj" in parts, "down_proj" in parts) == (kept > 0, width > 0)
        if kept:
            out, keys = (rounding.unpack(parts[name]).float() for name in ("o_proj", "k_proj"))
            assert torch.equal(out[:, : kept * GROUP_COLUMNS], layer.heads.out.float())
            assert out[:, kept * GROUP_COLUMNS :].count_nonzero() == keys[kept * GROUP_COLUMNS :].count_nonzero() == 0


def test_attention_that_no_group_of_numbers_divides_is_refused(source: Path) -> None:
    with pytest.raises(LopError, match=r"none divides the rows of all matrices, .* 12, 72, 160"):
        packing(read_tensors(source), family_of(source), 4, granularity=8, heads=12)


def states(backbone: Any, encoded: Any) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([list(backbone.hidden(b.embeddings, b.rotation, b.groups))[-1] for b in encoded.batches])
