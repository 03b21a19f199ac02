"""A small random Qwen2-VL, from calibration to exported checkpoints that load and generate where people load them."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

import lop
from lop.checkpoint.export import export
from lop.checkpoint.recovery import recover_checkpoint, recover_elastic
from lop.cli import main
from lop.model.adapter import QwenVL, load_model
from lop.model.elastic import ElasticModel
from lop.model.encoding import Encoded, encode
from lop.model.families import qwen2_vl
from lop.model.find import assets
from lop.model.generation import answers
from lop.model.importance import activation, order
from lop.model.samples import Sample, SampleSets
from lop.model.statistics import NeuronStatistics, calibrate
from lop.search.evaluator import Evaluator
from lop.space.allocation import Allocation
from tests.commands import FEW
from tests.lop.checkpoint import without_lop
from tests.lop.model.test_model import inputs_of

HIDDEN, LAYERS, NEURONS = 24, 3, 32
PATCH, MERGE, PIXELS = 8, 4, 64 * 64
TOKENS = ("image_pad", "video_pad", "vision_start", "vision_end")
ALLOCATION = Allocation((24, 8, 16))
# Format and recovery of each form.
FORMS = {
    "hf": ("hf", "none"),
    "bias": ("hf", "bias"),
    "refit": ("hf", "refit"),
    "padded": ("padded", "none"),
    "refit, padded": ("padded", "refit"),
}
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


def make_model(folder: Path) -> Path:
    """An ordinary checkpoint in bfloat16, with the embedded model's vocabulary and chat template."""
    tokenizer = AutoTokenizer.from_pretrained(assets() / "model")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in TOKENS}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": NEURONS,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": HIDDEN,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    shape = {"patch_size": PATCH, "merge_size": MERGE, "size": {"shortest_edge": PIXELS, "longest_edge": PIXELS}}
    processors = Qwen2VLImageProcessor(**shape), tokenizer, Qwen2VLVideoProcessor(**shape)
    Qwen2VLProcessor(*processors, chat_template=tokenizer.chat_template).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Made:
    """One allocation, exported in each form, and what the elastic model says with it."""

    model: Path
    folder: Path
    order: np.ndarray
    statistics: NeuronStatistics
    calibration: list[Sample]
    scores: dict[str, np.ndarray]
    logits: dict[str, torch.Tensor]
    generated: dict[str, list[int]]


def elastic_form(elastic: ElasticModel, recovery: str, statistics: NeuronStatistics, calibration: Encoded) -> None:
    """Recovers, with what recovery makes as checkpoints hold it: in bfloat16."""
    recover_elastic(elastic, ALLOCATION, recovery, means=statistics.mean, calibration=calibration)
    for layer in elastic.backbone.layers:
        ffn: Any = layer.ffn
        ffn.bias, ffn.refitted = (None if x is None else x.bfloat16().float() for x in (ffn.bias, ffn.refitted))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, samples: SampleSets) -> Made:
    folder = tmp_path_factory.mktemp("qwen2_vl")
    path = make_model(folder / "dense")
    model, calibration, tested = load_model(path), list(samples.calibration[::20]), samples.test[:24]
    encoded, test = (encode(model, chosen, batch_tokens=700) for chosen in (calibration, tested))
    statistics = calibrate(model, encoded)
    rows = order(activation(statistics))
    inputs = inputs_of(model, samples.test[5])
    torch.save(inputs, folder / "inputs.pt")
    elastic = ElasticModel(model, rows)
    scores, logits, generated = {}, {}, {}
    for form, (format, recovery) in FORMS.items():
        spool = folder / f"{form}-spool"
        spool.mkdir()
        recovered = recover_checkpoint(
            path, ALLOCATION, recovery, spool,
            order=rows, means=statistics.mean, samples=calibration, batch_tokens=700,
        )  # fmt: skip
        export(path, folder / form, ALLOCATION, rows, about={}, format=format, recovered=recovered)
        elastic_form(elastic, recovery, statistics, encoded)
        scores[form] = Evaluator(elastic, test).scores().log_probability
        logits[form], generated[form] = without_lop.run(model.model, inputs), without_lop.generate(model.model, inputs)
    return Made(path, folder, rows, statistics, calibration, scores, logits, generated)


@pytest.fixture(scope="module")
def seen(made: Made) -> dict[str, Any]:
    """What a process saw that knows transformers but not LOP."""
    task = made.folder / "task.json"
    checkpoints = {form: str(made.folder / form) for form in FORMS}
    task.write_text(json.dumps({"inputs": str(made.folder / "inputs.pt"), "checkpoints": checkpoints, "others": False}))
    environment = {**os.environ, "HF_HOME": str(made.folder / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", without_lop.__file__, str(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("form", FORMS)
def test_transformers_alone_says_what_the_elastic_model_says(form: str, made: Made, seen: dict[str, Any]) -> None:
    is_padded = FORMS[form][0] == "padded"
    assert seen[form]["class"] == ("" if is_padded else "Lop") + "Qwen2VLForConditionalGeneration"
    expected = [max(ALLOCATION.widths)] * LAYERS if is_padded else list(ALLOCATION.widths)
    assert seen[form]["widths"] == expected
    torch.testing.assert_close(torch.load(made.folder / f"{form}.logits"), made.logits[form], **TOLERANCE)
    assert seen[form]["generated"] == made.generated[form]
    assert len(seen[form]["generated"]) > 4
    assert seen[form]["round_trip"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_the_lean_backbone_says_what_the_checkpoint_says(form: str, made: Made, samples: SampleSets) -> None:
    """The search's scores, by rotations, lean layers and attention of LOP's own, against transformers' forward pass."""
    loaded = QwenVL(lop.load(made.folder / form), load_model(made.model).processor)
    tokenizer = loaded.processor.tokenizer
    for sample, score in zip(samples.test[:24:5], made.scores[form][::5]):
        inputs = inputs_of(loaded, sample)
        answer = torch.tensor([[*tokenizer(sample.answer)["input_ids"], tokenizer.eos_token_id]])
        for name, tail in (("input_ids", answer), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(answer) + tail], dim=1)
        places = without_lop.run(loaded.model, inputs)[0, -answer.shape[1] - 1 : -1].log_softmax(-1)
        assert float(places.gather(1, answer.T).sum()) == pytest.approx(score, abs=1e-3)


def test_recoveries_say_different_things(made: Made) -> None:
    assert len({tuple(np.round(made.scores[form], 3)) for form in ("hf", "bias", "refit")}) == 3
    np.testing.assert_allclose(made.scores["padded"], made.scores["hf"], atol=1e-6)


def test_a_refit_streamed_from_disk_is_the_one_in_memory(made: Made) -> None:
    model = load_model(made.model)
    elastic = ElasticModel(model, made.order)
    calibration = encode(model, made.calibration, batch_tokens=700)
    recover_elastic(elastic, ALLOCATION, "refit", means=made.statistics.mean, calibration=calibration)
    stored = load_file(made.folder / "refit" / "model.safetensors")
    for index, layer in enumerate(elastic.backbone.layers):
        ffn: Any = layer.ffn
        # bfloat16 rounds by 2⁻⁹ at most.
        found = stored[f"model.layers.{index}.mlp.down_proj.weight"].float()
        torch.testing.assert_close(found, ffn.refitted, rtol=2**-8, atol=1e-5)


def test_newer_names_of_tensors_are_the_same_model(made: Made, samples: SampleSets, tmp_path: Path) -> None:
    """As transformers 4.52 and later have them in memory, and some tools write them."""
    dense = load_model(made.model)
    shutil.copytree(made.model, tmp_path, dirs_exist_ok=True)
    tensors = load_file(made.model / "model.safetensors")
    renamed = {qwen2_vl.FAMILY.parameter(name): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    inputs = inputs_of(dense, samples.test[5])
    assert torch.equal(without_lop.run(load_model(tmp_path).model, inputs), without_lop.run(dense.model, inputs))
    (tmp_path / "spool").mkdir()
    recovered = recover_checkpoint(
        tmp_path, ALLOCATION, "refit", tmp_path / "spool",
        order=made.order, means=made.statistics.mean, samples=made.calibration, batch_tokens=700,
    )  # fmt: skip
    export(tmp_path, tmp_path / "pruned", ALLOCATION, made.order, about={}, recovered=recovered)
    found = without_lop.run(lop.load(tmp_path / "pruned"), inputs)
    torch.testing.assert_close(found, made.logits["refit"], **TOLERANCE)


def test_the_command_line_takes_it_from_calibration_to_a_checkpoint(
    made: Made, samples: SampleSets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--config", "tiny", "--model", str(made.model), "--run", str(tmp_path / "run"), *FEW]
    assert main(["calibrate", *settings]) == 0
    assert main(["search", *settings, "--workers", "0"]) == 0
    assert main(["train", *settings, "--workers", "0"]) == 0
    assert main(["prune", *settings, "--target", "0.5", "--out", str(tmp_path / "small")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "small"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verified"]
    assert sum(found["widths"]) == LAYERS * NEURONS // 2
    assert "qwen2_vl" in (tmp_path / "small" / "README.md").read_text()
    assert all(answers(load_model(tmp_path / "small"), samples.test[:2]))
