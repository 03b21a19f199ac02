"""Checkpoints of 8 and 4 bits: what is in them, what they weigh, who opens them, and what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import lop
from lop.checkpoint.bits import QUANTISED, packing
from lop.checkpoint.compensation import compensated, quantised_elastic
from lop.checkpoint.export import export
from lop.checkpoint.footprint import Footprint
from lop.checkpoint.quantise import quantise
from lop.cli import main
from lop.errors import LopError
from lop.model.adapter import QwenVL
from lop.model.elastic import ElasticModel
from lop.model.encoding import Encoded
from lop.model.find import assets
from lop.model.rounding import Rounding
from lop.model.samples import SampleSets
from lop.model.shape import read_shape
from lop.model.sources import family_of
from lop.model.statistics import NeuronStatistics
from lop.model.tensors import model_size
from lop.search.evaluator import Evaluator
from lop.space.allocation import Allocation, Space, project
from lop.space.memory import Load
from lop.space.size import Target
from lop.storage.headers import read_tensors
from tests.lop.model.test_model import inputs_of

# Older ones do not unpack when they load.
pytest.importorskip("transformers", minversion="5.24")

MODEL = assets() / "model"
TENSORS = read_tensors(MODEL)
SIZE = model_size(TENSORS)
SPACE = Space(SIZE.layers, SIZE.neurons, 8, 0.95)
FAMILY = family_of(MODEL)
ORDER = np.argsort(np.random.default_rng(3).random((SPACE.layers, SPACE.neurons)), axis=1)
UNEVEN = project(np.linspace(0.1, 0.8, SPACE.layers), SPACE, SPACE.budget(0.45))
FORMS = ("hf", "padded")
EXACT = {"rtol": 0, "atol": 0}


def packed(bits: int, *, vision: bool = False) -> Any:
    return packing(TENSORS, FAMILY, bits, granularity=SPACE.granularity, vision=vision)


@dataclass(frozen=True)
class Made:
    """An allocation in 16 bits and in fewer, in both formats, and what an image's question looks like."""

    folder: Path
    inputs: dict[str, torch.Tensor]

    def logits(self, model: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model(**self.inputs).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, shared_tiny: QwenVL, samples: SampleSets) -> Made:
    folder = tmp_path_factory.mktemp("quantised")
    for form in ("hf", "padded"):
        export(MODEL, folder / form, UNEVEN, ORDER, about={"source": "tiny"}, format=form)
        for bits in QUANTISED:
            export(MODEL, folder / f"{form}-{bits}", UNEVEN, ORDER, about={}, format=form, packing=packed(bits))
    return Made(folder, inputs_of(shared_tiny, samples.test[5]))


def rounded(model: Any, bits: int, group: int) -> Any:
    """The model with the weights of its backbone's linear layers rounded, as bfloat16 holds them."""
    rounding = Rounding(bits, group)
    for module in model.model.language_model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            weight = rounding.unpack(rounding.pack(module.weight.bfloat16()))
            # In float32 scales and numbers are multiplied without being rounded to bfloat16 again.
            module.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    return model


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("form", FORMS)
def test_transformers_says_what_rounded_weights_say(form: str, bits: int, made: Made) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(
        made.folder / f"{form}-{bits}", dtype=torch.float32, trust_remote_code=form == "hf"
    )
    said = made.logits(plain)
    expected = made.logits(rounded(lop.load(made.folder / form, dtype="float32"), bits, 8))
    torch.testing.assert_close(said, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(said, made.logits(lop.load(made.folder / f"{form}-{bits}", dtype="float32")), **EXACT)
    unrounded = made.logits(lop.load(made.folder / form, dtype="float32"))
    assert 0 < (said - unrounded).abs().mean() < {8: 0.1, 4: 2}[bits]


@pytest.mark.parametrize("bits", QUANTISED)
def test_a_checkpoint_quantised_later_is_the_one_quantised_at_once(bits: int, made: Made, tmp_path: Path) -> None:
    quantise(made.folder / "hf", tmp_path / "later", bits)
    later, at_once = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "later", made.folder / f"hf-{bits}")
    )
    assert later.keys() == at_once.keys()
    assert all(torch.equal(later[name], at_once[name]) for name in later)
    found = lop.inspect(tmp_path / "later")
    assert (found.bits, found.format, found.widths) == (bits, "hf", UNEVEN.widths)
    assert found.parameters == lop.inspect(made.folder / "hf").parameters
    assert found.bytes == Footprint(SIZE, quantised=packed(bits).weight(SIZE, TENSORS)).bytes(UNEVEN.widths)
    assert found.manifest["source"] == "tiny"
    said = found.manifest["quantised"]
    assert (said["bits"], said["group"], said["rounding"]) == (bits, 8, "nearest")
    assert said["library"].startswith("compressed-tensors ")


def test_the_dense_model_and_its_tower_are_quantised(made: Made, tmp_path: Path) -> None:
    quantise(MODEL, tmp_path / "dense", 8, name="tiny", vision=True)
    found = lop.inspect(tmp_path / "dense")
    assert (found.format, found.ratio, found.bits, found.damage) == ("dense", 0, 8, "")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    near = made.logits(lop.load(MODEL, dtype="float32"))
    assert 0 < (made.logits(plain) - near).abs().mean() < 0.1
    names = read_tensors(tmp_path / "dense")
    assert any("visual" in name and name.endswith("weight_packed") for name in names)
    assert not any(("embed_tokens" in name or "lm_head" in name) and "packed" in name for name in names)


@given(
    bits=st.sampled_from(QUANTISED),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
    form=st.sampled_from(["hf", "padded"]),
)
def test_a_size_is_never_exceeded_with_fewer_bits(bits: int, share: float, seed: int, form: str) -> None:
    footprint = Footprint(SIZE, form, "refit", quantised=packed(bits).weight(SIZE, TENSORS))
    least, most = (footprint.bytes([width] * SPACE.layers) for width in (SPACE.min_width, SPACE.neurons))
    asked = least + int(share * (most - least))

    def predict(budget: int) -> Allocation:
        return project(np.random.default_rng(seed).normal(0.5, 2, SPACE.layers), SPACE, budget)

    allocation = footprint.allocate(Target(bytes=asked), SPACE, predict)
    assert footprint.bytes(allocation.widths) <= asked
    larger = allocation.budget + SPACE.granularity * (SPACE.layers if form == "padded" else 1)
    if larger <= SPACE.layers * SPACE.neurons:
        assert footprint.bytes(project([SPACE.ratio(larger)] * SPACE.layers, SPACE, larger).widths) > asked
    for beyond in (least - 1, most + 1):
        with pytest.raises(LopError, match=f"of {beyond} bytes .* with {bits} bits: {least} to {most}"):
            footprint.budgets(Target(bytes=beyond), SPACE)


@pytest.mark.parametrize("form", ["hf", "padded"])
def test_in_memory_weights_are_what_loading_unpacks_them_to(form: str) -> None:
    quantised = packed(4).weight(SIZE, TENSORS)
    plain, small = (Footprint(SIZE, form, shape=read_shape(MODEL, 2), quantised=some) for some in (None, quantised))
    assert small.bytes(UNEVEN.widths) < plain.bytes(UNEVEN.widths)
    assert small.memory(UNEVEN.widths, Load(512)) == plain.memory(UNEVEN.widths, Load(512))
    target = Target(memory=plain.memory(UNEVEN.widths, Load(512)), load=Load(512))
    assert list(small.budgets(target, SPACE)) == list(plain.budgets(target, SPACE))


@pytest.mark.parametrize(("form", "vision"), [("hf", False), ("padded", True)])
@pytest.mark.parametrize("bits", QUANTISED)
def test_what_is_forecast_is_what_the_files_hold(form: str, vision: bool, bits: int, tmp_path: Path) -> None:
    chosen = packed(bits, vision=vision)
    export(MODEL, tmp_path / "out", UNEVEN, ORDER, about={}, format=form, packing=chosen)
    on_disk = sum(info.bytes for info in read_tensors(tmp_path / "out").values())
    assert on_disk == Footprint(SIZE, form, quantised=chosen.weight(SIZE, TENSORS)).bytes(UNEVEN.widths)


def test_compensation_keeps_the_model_near_and_gives_its_weights_back(
    tiny: QwenVL, tiny_statistics: NeuronStatistics, encoded: Encoded
) -> None:
    elastic = ElasticModel(tiny, ORDER)
    evaluator = Evaluator(elastic, encoded, divergence=True)
    evaluator.remember()
    layers = elastic.backbone.layers
    before = [
        weight.clone()
        for layer in layers
        for weight in (layer.heads.qkv, layer.heads.out, layer.ffn.gate, layer.ffn.down)
    ]
    found = {}
    for bits in (None, 8, 4, 2):
        with quantised_elastic(
            elastic,
            Allocation((SPACE.neurons,) * SPACE.layers),
            "refit" if bits else "none",
            Rounding(bits, 8) if bits else None,
            means=tiny_statistics.mean,
            calibration=encoded,
            dtype=torch.bfloat16,
        ):
            found[bits] = evaluator.now().divergence.mean()
    assert abs(found[None]) < 1e-4 < found[2]
    assert found[4] < found[2] / 10
    assert found[8] < found[2] / 10
    after = [
        weight for layer in layers for weight in (layer.heads.qkv, layer.heads.out, layer.ffn.gate, layer.ffn.down)
    ]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_what_is_scored_is_what_is_stored(tiny: QwenVL, encoded: Encoded) -> None:
    elastic, rounding = ElasticModel(tiny, ORDER), Rounding(4, 8)
    backbone = elastic.backbone
    stored = [SPACE.neurons] * SPACE.layers
    layers = list(
        compensated(backbone, backbone.layers, encoded, UNEVEN.widths, rounding, dtype=torch.bfloat16, stored=stored)
    )
    for layer, parts, width in zip(backbone.layers, layers, UNEVEN.widths, strict=True):
        assert torch.equal(rounding.unpack(parts["o_proj"]).float(), layer.heads.out.float())
        gate, down = rounding.unpack(parts["gate_proj"]).float(), rounding.unpack(parts["down_proj"]).float()
        assert torch.equal(gate[:width], layer.ffn.gate[:width].float())
        assert torch.equal(down[:, :width], layer.ffn.refitted.float())
        assert gate[width:].count_nonzero() == down[:, width:].count_nonzero() == 0


def test_the_command_line_prunes_quantises_and_predicts_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--bytes", "3.7MB", "--bits", "4"]
    assert main(["predict", *options, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert main(["prune", *options, "--recovery", "none", "--out", str(tmp_path / "out")]) == 0
    found = lop.inspect(tmp_path / "out")
    assert (found.bits, found.bytes, list(found.widths)) == (4, answer["bytes"], answer["widths"])
    assert found.bytes <= 3_700_000
    assert found.manifest["quantised"]["rounding"] == "compensated"
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "4 of the backbone's weights, by groups of 8 (compensated" in " ".join(capsys.readouterr().out.split())


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "quantised already": (lambda out: ["quantise", str(out / "hf-8"), "--bits", "4"], "is quantised.*made from"),
    "pruned from quantised": (
        lambda out: ["calibrate", "--model", str(out / "hf-4"), "--config", "tiny", "--run", str(out / "run")],
        "is quantised.*made from",
    ),
    "too small": (lambda out: ["prune", "--bytes", "1MB", "--bits", "4"], "with 4 bits: [0-9]+ to [0-9]+$"),
    "too large": (lambda out: ["prune", "--bytes", "4.4MB", "--bits", "4"], "with 4 bits: [0-9]+ to [0-9]+$"),
    "widths": (
        lambda out: ["prune", "--target", "0.3", "--bits", "4", "--set", "granularity=4"],
        "groups of 8 to 128: none divides .*multiples of granularity 4",
    ),
    "a narrow layer": (lambda out: ["prune", "--target", "0.8", "--bits", "4"], "layer [0-9]+ would keep 8 neurons"),
    "bits": (lambda out: ["quantise", str(out / "hf"), "--bits", "5"], "invalid choice: 5"),
    "as GGUF": (
        lambda out: ["prune", "--target", "0.3", "--bits", "4", "--format", "gguf"],
        "'gguf' has weights of a type of its own: leave out 4 bits, or take 'hf' or 'padded'$",
    ),
    "trained": (
        lambda out: ["prune", "--target", "0.3", "--bits", "8", "--recovery", "distil"],
        "'distil' trains weights that are not quantised: .*`lop quantise --bits 8`",
    ),
    "trained as GGUF": (
        lambda out: ["prune", "--target", "0.3", "--format", "gguf", "--recovery", "distil"],
        "'distil' trains what transformers loads: take 'hf' or 'padded', then `lop convert` it$",
    ),
    "converted": (lambda out: ["convert", str(out / "hf-4")], "is quantised.*made from"),
    "distilled": (lambda out: ["distil", str(out / "hf-4"), "--model", "tiny"], "is quantised.*made from"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(
    case: str, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, expected = REFUSED[case]
    try:
        place = [] if "--run" in (asked := command(made.folder)) else ["--out", str(tmp_path / "out")]
        code = main([*asked, *place])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(expected, line), line
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_the_line_names_its_installation(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lop.model.rounding.find_spec", lambda name: None)
    expected = r"pip install 'lop-vl\[quantise\]'"
    with pytest.raises(LopError, match=expected):
        quantise(MODEL, tmp_path / "out", 8)
    with pytest.raises(LopError, match=expected):
        lop.load(made.folder / "hf-8")
    assert list(tmp_path.iterdir()) == []


_QUANTISER = """
import sys, time
from pathlib import Path
from lop.checkpoint.quantise import quantise
from lop.interrupt import interruptible
from lop.model.find import assets

def tell(step, done, total):
    print(step, done, flush=True)
    if step == sys.argv[2] and done:
        time.sleep(60)

with interruptible():
    quantise(assets() / "model", Path(sys.argv[1]), 4, progress=tell)
"""


@pytest.mark.parametrize("step", ["quantise", "export"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_it_leaves_nothing_at_the_place(step: str, number: signal.Signals, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", _QUANTISER, str(tmp_path / "out"), step]
    # Tests may run in the background of a shell, which has its jobs ignore SIGINT.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith(step) or line.endswith(" 0\n"):
        assert line
    process.send_signal(number)
    process.communicate()
    left = [path.name for path in tmp_path.iterdir() if not path.name.startswith((".", "lop-packed-"))]
    assert left == []
    if number == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []
    quantise(MODEL, tmp_path / "out", 4)
    assert lop.inspect(tmp_path / "out").damage == ""


def test_damage_is_found(made: Made, tmp_path: Path) -> None:
    broken = shutil.copytree(made.folder / "hf-4", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name][0, 0] += 1
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert "model.safetensors" in lop.inspect(broken).damage
    del tensors[name]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    manifest = json.loads((broken / "lop.json").read_text())
    (broken / "lop.json").write_text(json.dumps({**manifest, "sha256": {}}))
    with pytest.raises(LopError, match="lacks some of the tensors that hold it"):
        lop.load(broken)
