"""Statistics, elastic model, evaluator and checkpoint on the embedded model, each against a naive computation."""

import json
import os
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import lop
from lop.checkpoint.export import export, verify
from lop.checkpoint.footprint import Footprint
from lop.errors import LopError
from lop.model.adapter import QwenVL
from lop.model.elastic import ElasticModel
from lop.model.encoding import Encoded, encode
from lop.model.find import assets
from lop.model.importance import activation, order
from lop.model.repair import Biases
from lop.model.samples import Sample, SampleSets, prompt_text
from lop.model.statistics import NeuronStatistics, calibrate, load_statistics
from lop.model.tensors import model_size
from lop.search.evaluator import Evaluator
from lop.search.racing import Candidate, sample_rounds
from lop.space.allocation import Allocation, Space, dense, project, uniform
from lop.storage.headers import read_tensors

MODEL = assets() / "model"
SIZE = model_size(read_tensors(MODEL))
SPACE = Space(SIZE.layers, SIZE.neurons, 8, 0.95)


@pytest.fixture(scope="module")
def uneven() -> Allocation:
    return project(np.linspace(0.1, 0.8, SPACE.layers), SPACE, SPACE.budget(0.45))


@pytest.fixture(scope="module")
def importance_order(tiny_statistics: NeuronStatistics) -> np.ndarray:
    return order(activation(tiny_statistics))


def inputs_of(model: QwenVL, sample: Sample) -> dict[str, torch.Tensor]:
    content = [{"type": "image"}, {"type": "text", "text": prompt_text(sample)}]
    text = model.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    image = Image.open(BytesIO(sample.image)).convert("RGB")
    return dict(model.processor(text=[text], images=[image], return_tensors="pt"))


def generated(model: QwenVL, sample: Sample) -> str:
    inputs = inputs_of(model, sample)
    output = model.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return str(model.processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def scored(model: QwenVL, samples: list[Sample]) -> np.ndarray:
    elastic = ElasticModel(model, np.tile(np.arange(SPACE.neurons), (SPACE.layers, 1)))
    return Evaluator(elastic, encode(model, samples, batch_tokens=500)).scores().correct


def test_scores_agree_with_generation(tiny: QwenVL, samples: SampleSets) -> None:
    chosen = list(samples.test[::120])
    expected = [generated(tiny, s) == s.answer + tiny.processor.tokenizer.eos_token for s in chosen]
    assert scored(tiny, chosen).tolist() == expected
    assert any(expected)


@pytest.mark.parametrize("rounds", [1, 3])
def test_batches_hold_every_token_and_no_padding(shared_tiny: QwenVL, samples: SampleSets, rounds: int) -> None:
    chosen = samples.reward[:200]
    parts = sample_rounds(len(chosen), rounds, seed=1)
    encoded = encode(shared_tiny, chosen, batch_tokens=1500, rounds=parts)
    tokenizer = shared_tiny.processor.tokenizer
    lengths = [inputs_of(shared_tiny, s)["input_ids"].shape[1] + len(tokenizer(s.answer)["input_ids"]) for s in chosen]
    assert sum(len(batch) for batch in encoded.batches) == sum(lengths)
    for part, batches in zip(parts, encoded.rounds, strict=True):
        owners = torch.cat([batch.samples for batch in batches])
        assert set(owners.tolist()) == set(part.tolist())
        assert sum(len(batch) for batch in batches) == sum(lengths[index] for index in part)
    for batch in encoded.batches:
        assert len(batch) <= 1500
        assert sum(group.count * group.length for group in batch.groups) == len(batch)
        written = [batch.tokens[batch.samples == owner].tolist() for owner in batch.samples.unique_consecutive()]
        answers = [chosen[owner].answer for owner in batch.samples.unique_consecutive()]
        assert written == [[*tokenizer(answer)["input_ids"], tokenizer.eos_token_id] for answer in answers]


def test_statistics_agree_with_a_naive_sum(shared_tiny: QwenVL, samples: SampleSets) -> None:
    chosen = samples.calibration[:12]
    hidden: list[torch.Tensor] = []
    hook = shared_tiny.ffns[3].down_proj.register_forward_pre_hook(lambda _, x: hidden.append(x[0][0].double()))
    tokenizer = shared_tiny.processor.tokenizer
    for sample in chosen:
        inputs = inputs_of(shared_tiny, sample)
        answer = torch.tensor([tokenizer(sample.answer)["input_ids"]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
        inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, answer.shape[1]))
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            shared_tiny.model(**inputs)
    hook.remove()
    tokens = torch.cat(hidden).numpy()
    found = calibrate(shared_tiny, encode(shared_tiny, chosen, batch_tokens=200))
    assert found.count == len(tokens)
    np.testing.assert_allclose(found.mean[3], tokens.mean(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.variance[3], tokens.var(0), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.squares[3], (tokens**2).sum(0), rtol=1e-3, atol=1e-5)
    weight = shared_tiny.ffns[3].down_proj.weight.double().numpy()
    np.testing.assert_allclose(found.down_l2[3], np.sqrt((weight**2).sum(0)), rtol=1e-12)
    np.testing.assert_allclose(found.down_l1[3], np.abs(weight).mean(0), rtol=1e-12)


def test_statistics_of_parts_merge_to_those_of_the_whole(shared_tiny: QwenVL, samples: SampleSets) -> None:
    def collect(part: slice) -> NeuronStatistics:
        return calibrate(shared_tiny, encode(shared_tiny, samples.calibration[part], batch_tokens=400))

    whole, merged = collect(slice(0, 30)), collect(slice(0, 11)).merge(collect(slice(11, 30)))
    assert whole.count == merged.count
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(merged.moment, whole.moment, rtol=1e-4, atol=1e-5)


def test_statistics_survive_a_file_and_damage_is_named(tmp_path: Path, tiny_statistics: NeuronStatistics) -> None:
    path = tmp_path / "statistics.safetensors"
    tiny_statistics.save(path, {"model": "abc"})
    found, prints = load_statistics(path)
    np.testing.assert_array_equal(found.moment, tiny_statistics.moment)
    assert (found.count, prints) == (tiny_statistics.count, {"model": "abc"})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LopError, match="damaged"):
        load_statistics(path)
    with pytest.raises(LopError, match="lop calibrate"):
        load_statistics(tmp_path / "none")


def test_sorting_leaves_the_dense_model_as_it_was(tiny: QwenVL, encoded: Encoded, importance_order: np.ndarray) -> None:
    plain = ElasticModel(tiny, np.tile(np.arange(SPACE.neurons), (SPACE.layers, 1)))
    before = Evaluator(plain, encoded).scores()
    plain.sort(importance_order)
    after = Evaluator(plain, encoded).scores()
    np.testing.assert_allclose(after.log_probability, before.log_probability, atol=1e-3)
    np.testing.assert_array_equal(after.correct, before.correct)


def test_slices_are_views_and_equal_masks(
    tiny: QwenVL, encoded: Encoded, importance_order: np.ndarray, uneven: Allocation
) -> None:
    weights = [ffn.down_proj.weight.clone() for ffn in tiny.ffns]
    elastic = ElasticModel(tiny, importance_order)
    with elastic.pruned(uneven):
        sliced = Evaluator(elastic, encoded).scores()
        layer = tiny.layers[2].mlp
        assert layer.down[:, : layer.width].data_ptr() == layer.down.data_ptr()
    for layer, width in enumerate(uneven.widths):
        pruned = importance_order[layer, width:]
        masked = weights[layer].clone()
        masked[:, pruned] = 0
        tiny.layers[layer].mlp.down.copy_(masked[:, importance_order[layer]])
    masked_scores = Evaluator(elastic, encoded).scores()
    np.testing.assert_allclose(sliced.log_probability, masked_scores.log_probability, atol=1e-3)


def test_evaluating_leaves_no_trace(
    tiny: QwenVL, encoded: Encoded, importance_order: np.ndarray, uneven: Allocation
) -> None:
    evaluator = Evaluator(ElasticModel(tiny, importance_order), encoded)
    first = evaluator.evaluate(Candidate(dense(SPACE)))
    pruned = evaluator.evaluate(Candidate(uneven))
    assert evaluator.evaluate(Candidate(dense(SPACE))) == first
    assert evaluator.evaluate(Candidate(uneven)) == pruned
    assert pruned != first


def test_compensation_is_the_mean_contribution(
    tiny: QwenVL, tiny_statistics: NeuronStatistics, importance_order: np.ndarray, uneven: Allocation
) -> None:
    weight = tiny.ffns[4].down_proj.weight.double().numpy().copy()
    elastic = ElasticModel(tiny, importance_order)
    elastic.prune(uneven, Biases(tiny_statistics.mean))
    pruned = importance_order[4, uneven.widths[4] :]
    expected = weight[:, pruned] @ tiny_statistics.mean[4, pruned]
    np.testing.assert_allclose(tiny.layers[4].mlp.bias.numpy(), expected, rtol=1e-4, atol=1e-6)
    elastic.restore()
    assert tiny.layers[4].mlp.bias is None


def test_a_checkpoint_is_the_elastic_model(
    tiny: QwenVL, tmp_path: Path, samples: SampleSets, importance_order: np.ndarray, uneven: Allocation
) -> None:
    out = tmp_path / "pruned"
    export(MODEL, out, uneven, importance_order, about={"target": 0.45})
    elastic = ElasticModel(tiny, importance_order)
    elastic.prune(uneven)
    loaded = lop.load(out)
    script = (
        "import sys, torch; from transformers import AutoModelForImageTextToText as M;"
        "m = M.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval();"
        "i = torch.load(sys.argv[2]); torch.save(m(**i).logits.detach(), sys.argv[3])"
    )
    inputs = inputs_of(tiny, samples.test[5])
    torch.save(inputs, tmp_path / "inputs.pt")
    # Without LOP on the path: what a user of transformers alone would see.
    subprocess.run(
        [sys.executable, "-I", "-c", script, out, tmp_path / "inputs.pt", tmp_path / "logits.pt"],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
    )
    with torch.inference_mode():
        expected = tiny.model(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=2e-4, rtol=1e-4)
    widths = [layer.mlp.gate_proj.weight.shape[0] for layer in loaded.model.language_model.layers]
    assert tuple(widths) == uneven.widths
    tensors = read_tensors(out)
    assert sum(t.parameters for t in tensors.values()) == SIZE.pruned_parameters(uneven.budget)
    assert sum(t.bytes for t in tensors.values()) == Footprint(SIZE).bytes(uneven.widths)
    loaded.save_pretrained(tmp_path / "again")
    again = lop.load(tmp_path / "again")
    with torch.inference_mode():
        torch.testing.assert_close(again(**inputs).logits, loaded(**inputs).logits, atol=0, rtol=0)


def test_damage_to_a_checkpoint_is_named(tmp_path: Path, importance_order: np.ndarray, uneven: Allocation) -> None:
    out = tmp_path / "pruned"
    export(MODEL, out, uneven, importance_order, about={})
    assert verify(out)["widths"] == list(uneven.widths)
    with pytest.raises(LopError, match="is there already"):
        export(MODEL, out, uneven, importance_order, about={})
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(LopError, match=r"model\.safetensors is not what was written"):
        lop.load(out)
    file.write_bytes(data[:-10])
    with pytest.raises(LopError, match="damaged"):
        lop.load(out)
    file.unlink()
    with pytest.raises(LopError, match="missing"):
        lop.load(out)
    (out / "lop.json").write_text("{")
    with pytest.raises(LopError, match=r"lop\.json"):
        verify(out)


def test_a_full_disk_leaves_nothing(small_disk: Path, importance_order: np.ndarray, uneven: Allocation) -> None:
    with pytest.raises(OSError, match=r"(?i)space"):
        export(MODEL, small_disk / "pruned", uneven, importance_order, about={})
    assert list(small_disk.iterdir()) == []


def test_a_killed_export_leaves_no_finished_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lop", "prune", "--target", "0.3", "--out", str(tmp_path / "pruned")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(tmp_path.iterdir()):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "pruned").exists() or verify(tmp_path / "pruned")


def test_widths_of_a_model_that_is_pruned_already_are_named(
    tmp_path: Path, importance_order: np.ndarray, uneven: Allocation
) -> None:
    export(MODEL, tmp_path / "pruned", uneven, importance_order, about={})
    with pytest.raises(LopError, match="pruned already"):
        model_size(read_tensors(tmp_path / "pruned"))
    with pytest.raises(LopError, match="does not fit"):
        export(MODEL, tmp_path / "b", Allocation((8,)), importance_order[:1], about={})


def test_the_manifest_says_what_was_asked(tmp_path: Path, importance_order: np.ndarray) -> None:
    even = uniform(SPACE, SPACE.budget(0.5))
    export(MODEL, tmp_path / "p", even, importance_order, about={"target": 0.5, "source": "tiny"})
    manifest = json.loads((tmp_path / "p" / "lop.json").read_text())
    assert (manifest["target"], manifest["source"], manifest["widths"]) == (0.5, "tiny", list(even.widths))
    assert set(manifest["sha256"]) == {file.name for file in (tmp_path / "p").iterdir()} - {"lop.json"}
