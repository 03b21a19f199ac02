"""Loaders × formats: what each loader was seen to do with each format is what docs/checkpoints.md says."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lop
from lop.checkpoint.export import export, verify
from lop.checkpoint.recovery import recover_checkpoint, recover_elastic
from lop.errors import LopError
from lop.model.adapter import QwenVL, load_model
from lop.model.elastic import ElasticModel
from lop.model.encoding import encode
from lop.model.find import assets
from lop.model.importance import activation, order
from lop.model.samples import SampleSets
from lop.model.statistics import NeuronStatistics
from lop.model.tensors import model_size
from lop.search.evaluator import Evaluator
from lop.space.allocation import Allocation, Space, project
from lop.storage.headers import read_header, read_tensors
from tests.lop.model.test_model import inputs_of

MODEL = assets() / "model"
SIZE = model_size(read_tensors(MODEL))
SPACE = Space(SIZE.layers, SIZE.neurons, 8, 0.95)
FORMS = ("hf", "padded", "bias", "refit")
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


@dataclass(frozen=True)
class Made:
    """The same allocation, exported in each form, and what the elastic model says with it."""

    folder: Path
    allocation: Allocation
    order: np.ndarray
    inputs: dict[str, torch.Tensor]
    logits: dict[str, torch.Tensor]
    generated: dict[str, list[int]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_statistics: NeuronStatistics, samples: SampleSets) -> Made:
    folder = tmp_path_factory.mktemp("formats")
    rows = order(activation(tiny_statistics))
    allocation = project(np.linspace(0.1, 0.7, SPACE.layers), SPACE, SPACE.budget(0.4))
    chosen = samples.calibration[::10]
    model = load_model(MODEL)
    inputs = inputs_of(model, samples.test[5])
    calibration = encode(model, chosen, batch_tokens=700)
    elastic = ElasticModel(model, rows)
    logits, generated = {}, {}
    for form in FORMS:
        recovery = form if form in ("bias", "refit") else "none"
        spool = folder / f"{form}-spool"
        spool.mkdir()
        recovered = recover_checkpoint(
            MODEL, allocation, recovery, spool,
            order=rows, means=tiny_statistics.mean, samples=chosen, batch_tokens=700,
        )  # fmt: skip
        kind = "padded" if form == "padded" else "hf"
        export(MODEL, folder / form, allocation, rows, about={}, format=kind, recovered=recovered)
        recover_elastic(elastic, allocation, recovery, means=tiny_statistics.mean, calibration=calibration)
        for ffn in (layer.mlp for layer in model.layers):
            # As the checkpoint holds them: in the dense one's type.
            ffn.bias, ffn.refitted = (None if x is None else x.bfloat16().float() for x in (ffn.bias, ffn.refitted))
        with torch.inference_mode():
            logits[form] = model.model(**inputs).logits.clone()
        output = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        generated[form] = output[0, inputs["input_ids"].shape[1] :].tolist()
    torch.save(inputs, folder / "inputs.pt")
    return Made(folder, allocation, rows, inputs, logits, generated)


@pytest.fixture(scope="module")
def seen(made: Made) -> dict[str, Any]:
    """What a process saw that knows transformers but not LOP."""
    task = made.folder / "task.json"
    checkpoints = {form: str(made.folder / form) for form in FORMS}
    asked = {"inputs": str(made.folder / "inputs.pt"), "checkpoints": checkpoints, "others": True}
    task.write_text(json.dumps(asked))
    environment = {**os.environ, "HF_HOME": str(made.folder / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(Path(__file__).with_name("without_lop.py")), str(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("form", FORMS)
def test_transformers_alone_says_what_the_elastic_model_says(form: str, made: Made, seen: dict[str, Any]) -> None:
    widest = max(made.allocation.widths)
    expected = [widest if form == "padded" else width for width in made.allocation.widths]
    assert seen[form]["widths"] == expected
    assert seen[form]["is_qwen"]
    assert seen[form]["class"] == ("" if form == "padded" else "Lop") + "Qwen2_5_VLForConditionalGeneration"
    logits = torch.load(made.folder / f"{form}.logits")
    torch.testing.assert_close(logits, made.logits[form], **TOLERANCE)
    assert seen[form]["generated"] == made.generated[form]


@pytest.mark.parametrize("form", FORMS)
def test_saving_and_loading_again_changes_no_bit(form: str, seen: dict[str, Any]) -> None:
    assert seen[form]["round_trip"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_lora_trains_is_saved_and_merged(form: str, seen: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    result = seen[form]["adapter"]
    assert isinstance(result, dict), result
    assert result["last_loss"] < result["first_loss"]
    assert result["moved"] > 1e-3
    assert result["restored"] < 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_int8_weights_answer_nearly_alike(form: str, made: Made, seen: dict[str, Any]) -> None:
    pytest.importorskip("torchao")
    result = seen[form]["int8"]
    assert isinstance(result, dict), result
    assert result["type"] in ("Int8Tensor", "AffineQuantizedTensor")  # Newer and older torchao.
    assert result["agreement"] > 0.9
    assert len(result["generated"]) > 0


@pytest.mark.parametrize("form", FORMS)
def test_lop_opens_every_form_without_remote_code(form: str, made: Made) -> None:
    with torch.inference_mode():
        loaded = lop.load(made.folder / form)(**made.inputs).logits
    torch.testing.assert_close(loaded, torch.load(made.folder / f"{form}.logits"), **TOLERANCE)


def test_padding_changes_no_answer_and_costs_what_it_says(made: Made) -> None:
    manifest = verify(made.folder / "padded")
    true, padded = (sum(t.bytes for t in read_tensors(made.folder / form).values()) for form in ("hf", "padded"))
    assert manifest["padding_bytes"] == padded - true > 0
    assert verify(made.folder / "hf")["padding_bytes"] == 0
    torch.testing.assert_close(made.logits["padded"], made.logits["hf"], rtol=0, atol=0)
    config = json.loads((made.folder / "padded" / "config.json").read_text())
    dense = json.loads((MODEL / "config.json").read_text())
    assert config["text_config"].pop("intermediate_size") == max(made.allocation.widths)
    dense["text_config"].pop("intermediate_size")
    assert config == dense
    spool = made.folder / "bias-spool"
    biases = {name: info for file in spool.iterdir() for name, info in read_header(file).items()}
    with pytest.raises(LopError, match="no place for a bias"):
        export(MODEL, made.folder / "no", made.allocation, made.order, about={}, format="padded", recovered=biases)
    assert not (made.folder / "no").exists()


def test_recovery_changes_only_what_it_should(made: Made) -> None:
    plain, bias, refit = (load_file(made.folder / form / "model.safetensors") for form in ("hf", "bias", "refit"))
    added = {name for name in bias if name.endswith("down_proj.bias") and "visual" not in name}
    assert len(added) == SPACE.layers
    assert bias.keys() - added == plain.keys() == refit.keys()
    changed = {name for name in plain if not torch.equal(plain[name], refit[name])}
    assert changed == {name for name in plain if name.endswith("mlp.down_proj.weight") and "visual" not in name}
    assert all(torch.equal(plain[name], bias[name]) for name in plain)
    assert {tensor.dtype for tensor in refit.values()} == {torch.bfloat16}


def test_refitting_in_memory_and_from_disk_agree(
    made: Made, tiny: QwenVL, tiny_statistics: NeuronStatistics, samples: SampleSets
) -> None:
    chosen = samples.calibration[::10]
    calibration = encode(tiny, chosen, batch_tokens=700)
    elastic = ElasticModel(tiny, made.order)
    recover_elastic(elastic, made.allocation, "refit", means=tiny_statistics.mean, calibration=calibration)
    stored = load_file(made.folder / "refit" / "model.safetensors")
    for layer, module in enumerate(tiny.layers):
        name = next(n for n in stored if n.endswith(f"layers.{layer}.mlp.down_proj.weight") and "visual" not in n)
        # bfloat16 rounds by 2⁻⁹ at most.
        torch.testing.assert_close(stored[name].float(), module.mlp.refitted, rtol=2**-8, atol=1e-5)
    before = Evaluator(elastic, calibration).scores().log_probability.mean()
    recover_elastic(elastic, made.allocation, "none", means=tiny_statistics.mean, calibration=calibration)
    assert before > Evaluator(elastic, calibration).scores().log_probability.mean()
