"""llama.cpp runs the files: it cuts text as transformers does, and says what transformers says."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lop.checkpoint.export import convert
from lop.model.adapter import QwenVL, load_model
from lop.model.encoding import chat_text
from lop.model.find import assets, find_model
from lop.model.samples import SampleSets

pytest.importorskip("llama_cpp")
from tests.agreement import divergence, says
from tests.llama import MARKER, Eyes, Llama, quantise

TEXTS = (
    "Hello, world! It's 2024: 3.14 — naïve café 你好\n\n  tabs\tand 12345 numbers",
    "<|im_start|>user\nWhat colour is the circle?<|im_end|>\n<|im_start|>assistant\n",
    "a  b   c    \n\n\n d\r\n e",
    "I'LL don't we've 'S",
    "😀 ½ ² ① \u00a0x\u3000y",
    "<|vision_start|><|image_pad|><|vision_end|>",
)
AT_F16 = 1e-3
AT = {"gguf": AT_F16, "gguf-q8_0": 1e-2, "gguf-q4_1": 0.1, "gguf-q4_0": 0.1}


@pytest.fixture(scope="module")
def network(pruned: Path) -> QwenVL:
    return load_model(pruned)


@pytest.mark.parametrize("form", AT)
def test_it_says_what_transformers_says(
    form: str, pruned: Path, network: QwenVL, samples: SampleSets, tmp_path: Path
) -> None:
    convert(pruned, tmp_path / "out", format=form)
    with Llama(next((tmp_path / "out").glob("*.gguf"))) as llama:
        found = [divergence(llama, *says(network, sample)) for sample in samples.test[::300]]
    assert max(item["mean"] for item in found) < AT[form]
    assert np.mean([item["mean"] for item in found]) > 0
    if form == "gguf":
        assert all(item["same"] for item in found)


def test_llama_cpps_own_quantiser_takes_the_file(
    pruned: Path, network: QwenVL, samples: SampleSets, tmp_path: Path
) -> None:
    convert(pruned, tmp_path / "out")
    quantise(tmp_path / "out" / "model-f16.gguf", tmp_path / "smaller.gguf")
    with Llama(tmp_path / "smaller.gguf") as llama:
        assert divergence(llama, *says(network, samples.test[0]))["mean"] < 0.1


def test_a_file_of_true_widths_is_refused_by_an_unchanged_llama_cpp(pruned: Path, tmp_path: Path) -> None:
    convert(pruned, tmp_path / "out", format="gguf-true")
    with pytest.raises(RuntimeError, match=r"ffn_gate\.weight' has wrong shape"):
        Llama(tmp_path / "out" / "model-f16.gguf")


@pytest.mark.parametrize("model", ["tiny", "smol", "qwen2"])
def test_it_cuts_text_as_transformers_does(model: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from lop.errors import LopError

    folder = tmp_path / "model"
    shutil.copytree(assets() / "model", folder)
    if model == "smol":
        try:
            source = find_model("smol")
        except LopError as error:
            pytest.skip(str(error))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(source / name, folder / name)
        _widen(folder, 49156)
    if model == "qwen2":
        _split_as_qwen2(folder)
    convert(folder, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with Llama(tmp_path / "out" / "model-f16.gguf") as llama:
        for text in TEXTS:
            assert llama.tokens(text) == tokenizer(text)["input_ids"], text


def _widen(folder: Path, vocabulary: int) -> None:
    """Gives a checkpoint embeddings for as many tokens; what they are is not looked at."""
    import json

    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name] = torch.zeros(vocabulary, tensors[name].shape[1], dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = vocabulary
    (folder / "config.json").write_text(json.dumps(config))


def _split_as_qwen2(folder: Path) -> None:
    """Has a tokenizer cut text by the rule of the published Qwen2.5-VL."""
    import json

    from lop.checkpoint.edge.tokenizer import _QWEN2

    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    split: dict[str, Any] = {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, plain]}
    file.write_text(json.dumps(tokenizer))


@pytest.fixture(scope="module")
def eyes(towered: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The files of a model with a tower like the published ones', in llama.cpp and in transformers."""
    out = tmp_path_factory.mktemp("eyes") / "out"
    convert(towered, out)
    with Llama(out / "model-f16.gguf") as llama, Eyes(out / "mmproj-f16.gguf", llama) as found:
        yield found, load_model(towered)


def picture(height: int, width: int) -> np.ndarray:
    """Soft blots of colour."""
    dots = np.random.default_rng(height).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(dots).resize((width, height), Image.Resampling.BICUBIC))


def seen(network: QwenVL, pixels: np.ndarray) -> tuple[np.ndarray, torch.Tensor, str]:
    """The image's embeddings by transformers, its logits at the end of a question, and the question for llama.cpp."""
    text = chat_text(network, "What colour is it?")
    inputs = network.processor(text=[text], images=[Image.fromarray(pixels)], return_tensors="pt")
    with torch.inference_mode():
        (embeddings,) = network.family.image_features(network.model, inputs["pixel_values"], inputs["image_grid_thw"])
        logits = network.model(**inputs).logits[0, -1]
    return embeddings.numpy(), logits, text.replace("<|vision_start|><|image_pad|><|vision_end|>", MARKER)


def apart(logits: torch.Tensor, said: np.ndarray) -> float:
    ours, theirs = (torch.as_tensor(x).double().log_softmax(-1) for x in (logits, said))
    return float((ours.exp() * (ours - theirs)).sum())


@pytest.mark.parametrize(("height", "width"), [(112, 140), (280, 364), (56, 224)])
def test_it_sees_what_transformers_sees(height: int, width: int, eyes: Any) -> None:
    """Windows of eight patches that fit and that do not, and blocks that look at all."""
    found, network = eyes
    pixels = picture(height, width)
    embeddings, logits, text = seen(network, pixels)
    given, said = found.look(text, pixels)
    assert given.shape == embeddings.shape
    assert np.linalg.norm(given - embeddings) < 3e-3 * np.linalg.norm(embeddings)
    assert apart(logits, said) < AT_F16


def test_images_of_odd_sizes_are_padded_where_transformers_stretches(eyes: Any) -> None:
    """So what both see differs: given the padded image, transformers sees what llama.cpp does."""
    found, network = eyes
    pixels = picture(100, 150)
    embeddings, _, text = seen(network, pixels)
    given, said = found.look(text, pixels)
    assert np.linalg.norm(given - embeddings) > 0.1 * np.linalg.norm(embeddings)
    within = Image.fromarray(pixels).resize((140, 94), Image.Resampling.BICUBIC)
    padded = np.zeros((112, 140, 3), np.uint8)
    padded[9 : 9 + 94] = np.asarray(within)
    embeddings, logits, _ = seen(network, padded)
    assert np.linalg.norm(given - embeddings) < 0.05 * np.linalg.norm(embeddings)
    assert apart(logits, said) < 10 * AT_F16
