"""Loaders × formats, each used for real: `python benchmarks/loaders.py [--transformers 4.49.0] [--vllm PYTHON] …`.

Exports the embedded model with a width of its own for each layer, in every format, with the flat config that the
published checkpoints have. Each loader then opens each format in a process of its own and is held against the elastic
model, which is what the search evaluates. transformers of this environment with PEFT and torchao, and `lop.load`, are
always there; the others need an environment (or, for a transformers, get one) of their own:

    --transformers VERSION        another release; an environment is made for it, on top of this one
    --lmms-eval PYTHON            an interpreter with lmms-eval, decord and qwen-vl-utils
    --vllm PYTHON                 one with vLLM; builds the model on a CPU, without vLLM's kernels
    --llama-cpp SOURCES PYTHON    llama.cpp's sources, and one with gguf, sentencepiece and xllamacpp

The interpreters need what LOP needs, too (a `.pth` file that names this environment's site-packages will do). The last
line is JSON.
"""

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
TRANSFORMERS_PROBE = REPOSITORY / "tests" / "lop" / "checkpoint" / "without_lop.py"
FORMATS = ("hf", "padded")
TOLERANCE = 2e-4  # of a logit, in float32
TOKENS = 8
TASK = "lop_mmbench"
DOCUMENTS = 12


def main() -> None:
    """Goes through the loaders that were asked for."""
    parser = argparse.ArgumentParser(description="Which loader does what with which format.")
    parser.add_argument("--transformers", action="append", default=[], metavar="VERSION")
    parser.add_argument("--lmms-eval", metavar="PYTHON")
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--llama-cpp", nargs=2, metavar=("SOURCES", "PYTHON"))
    parser.add_argument("--probe", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.probe:
        name, *arguments = options.probe
        print(json.dumps(PROBES[name](*arguments)))
        return
    with TemporaryDirectory() as parent:
        folder = Path(parent)
        make_checkpoints(folder)
        results = {f"transformers {version('transformers')}": transformers_probe(folder, sys.executable, others=True)}
        results["lop.load"] = own_probes(folder, "lop", sys.executable)
        for number in options.transformers:
            python = make_environment(folder / number, number)
            results[f"transformers {number}"] = transformers_probe(folder, python, others=False)
        if options.lmms_eval:
            results["lmms-eval"] = own_probes(folder, "lmms_eval", options.lmms_eval)
        if options.vllm:
            results["vLLM"] = own_probes(folder, "vllm", options.vllm)
        if options.llama_cpp:
            sources, python = options.llama_cpp
            results["llama.cpp"] = own_probes(folder, "llama_cpp", python, sources)
    for loader, formats in results.items():
        for name, seen in formats.items():
            print(f"{loader:<20} {name:<7} {seen}")
    print(json.dumps({"benchmark": "loaders", "tolerance": TOLERANCE, "results": results}))


def make_checkpoints(folder: Path) -> None:
    """Writes `dense`, the formats, and what the elastic model says on a question with an image and one without."""
    from lop.checkpoint.export import export
    from lop.model.adapter import load_model
    from lop.model.elastic import ElasticModel
    from lop.model.find import EMBEDDED, assets
    from lop.run.config import find_config, load_config
    from lop.run.run import Run
    from lop.space.allocation import project
    from tests.lop.model.test_model import inputs_of

    run = Run(load_config(find_config(EMBEDDED)), assets() / "run")
    dense = folder / "dense"
    shutil.copytree(run.model_folder, dense)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(as_published(config), indent=2))
    allocation = project(np.linspace(0.1, 0.7, run.space.layers), run.space, run.space.budget(0.4))
    for name in FORMATS:
        export(dense, folder / name, allocation, run.order, about={}, format=name)
    model = load_model(dense, device="cpu", dtype="float32")
    ElasticModel(model, run.order).prune(allocation)
    inputs = {"image": inputs_of(model, run.samples.test[5])}
    question = model.processor.tokenizer(run.samples.test[5].question, return_tensors="pt")
    # Not to its end, so that several words could be next.
    inputs["text"] = {name: value[:, :-2] for name, value in question.items()}
    reference: dict[str, Any] = {"widths": allocation.widths}
    for kind, given in inputs.items():
        with torch.inference_mode():
            logits = model.model(**given).logits
            tokens = model.model.generate(**given, max_new_tokens=TOKENS, do_sample=False)
        reference[kind] = {"logits": logits, "tokens": tokens[0, logits.shape[1] :].tolist()}
    torch.save(inputs["image"], folder / "inputs.pt")
    torch.save(inputs["text"], folder / "text.pt")
    torch.save(reference, folder / "reference.pt")


def as_published(config: dict[str, Any]) -> dict[str, Any]:
    """The config in the form of the published checkpoints, which every transformers with Qwen2.5-VL reads."""
    config = dict(config)
    text, vision, dtype = (config.pop(name) for name in ("text_config", "vision_config", "dtype"))
    rope = text.pop("rope_parameters")
    for part, name in (
        (text, "model_type"),
        (text, "layer_types"),
        (vision, "model_type"),
        (vision, "rope_parameters"),
    ):
        part.pop(name)
    return {
        **config,
        **text,
        "torch_dtype": dtype,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "sliding_window": text["max_position_embeddings"],
        "vision_config": vision,
    }


def make_environment(folder: Path, number: str) -> str:
    """An interpreter that has this transformers, and everything else from the environment that runs this."""
    venv.create(folder)
    python = folder / "bin" / "python"
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    (Path(site.strip()) / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install", f"transformers=={number}"]
    subprocess.run(command, check=True)
    return str(python)


def transformers_probe(folder: Path, python: str, *, others: bool) -> dict[str, dict[str, Any]]:
    """What a transformers that does not know LOP makes of each format."""
    results = {}
    for name in FORMATS:
        asked = {"inputs": str(folder / "inputs.pt"), "checkpoints": {name: str(folder / name)}, "others": others}
        task = folder / "task.json"
        task.write_text(json.dumps(asked))
        seen = run([python, "-I", str(TRANSFORMERS_PROBE), str(task)], folder)
        if "error" not in seen:
            (seen,) = seen.values()
            reference = torch.load(folder / "reference.pt")["image"]
            logits = torch.load((folder / name).with_suffix(".logits"))
            seen["worst_logit"] = (logits - reference["logits"]).abs().max().item()
            seen["generated"] = seen["generated"] == reference["tokens"]
        results[name] = seen
    return results


def own_probes(folder: Path, probe: str, python: str, *arguments: str) -> dict[str, dict[str, Any]]:
    """What another loader makes of each format, LOP being installed beside it."""
    command = [python, str(Path(__file__).resolve()), "--probe", probe, str(folder)]
    return {name: run([*command, name, *arguments], folder) for name in FORMATS}


def run(command: list[str], folder: Path) -> dict[str, Any]:
    """The JSON in the last line of what a command prints, or its last line of error."""
    environment = os.environ | {
        "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"error": next(line for line in reversed(done.stderr.splitlines()) if line.strip())}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def probe_lop(folder: str, name: str) -> dict[str, Any]:
    """`lop.load`: logits."""
    import lop

    with torch.inference_mode():
        logits = lop.load(Path(folder) / name, dtype="float32")(**torch.load(Path(folder) / "inputs.pt")).logits
    return {"worst_logit": (logits - torch.load(Path(folder) / "reference.pt")["image"]["logits"]).abs().max().item()}


def probe_lmms_eval(folder: str, name: str) -> dict[str, Any]:
    """The letters that lmms-eval's own `qwen2_5_vl` answers, and the same with LOP's class in it."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from lop.plugins.evaluate import manifest, tasks_folder

    for model in manifest():
        MODEL_REGISTRY_V2.register_manifest(model, overwrite=True)
    path, seen = Path(folder) / name, {}
    for model in ("qwen2_5_vl", "lop_qwen2_5_vl"):
        try:
            results = simple_evaluate(
                model=model,
                # Its own sizes of images are meant for photographs.
                model_args=f"pretrained={path},device=cpu,device_map=cpu,min_pixels=1024,max_pixels=65536",
                tasks=[TASK],
                task_manager=TaskManager("WARNING", include_path=str(tasks_folder()), include_defaults=False),
                limit=DOCUMENTS,
                batch_size=4,
                log_samples=True,
                bootstrap_iters=0,
                force_simple=True,
                verbosity="WARNING",
            )
        except Exception as error:
            seen[model] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        seen[model] = "".join(sample["filtered_resps"][0] for sample in results["samples"][TASK])
    return seen


def probe_vllm(folder: str, name: str) -> dict[str, Any]:
    """vLLM: finds the plugin, builds the model, loads the weights; widths, and what the FFNs compute."""
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", MASTER_ADDR="127.0.0.1", MASTER_PORT="29611")
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    # The package for GPUs takes a machine without one for no platform at all.
    vllm.platforms._current_platform = CpuPlatform()
    from vllm import ModelRegistry
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    plugin = [name for name in ModelRegistry.get_supported_archs() if name.startswith("Lop")]
    path = Path(folder) / name
    settings = EngineArgs(
        model=str(path), dtype="float32", enforce_eager=True, max_model_len=256, limit_mm_per_prompt={"image": 1}
    ).create_engine_config()
    with set_current_vllm_config(settings):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29612", 0, "gloo")
        initialize_model_parallel(1, 1)
        model = get_model(vllm_config=settings)

    import lop

    ours = lop.load(path, dtype="float32").model.language_model.layers
    theirs = model.language_model.model.layers
    x = torch.randn(5, ours[0].hidden_size)
    with torch.inference_mode():
        worst = max((a.mlp(x) - b.mlp(x)).abs().max().item() for a, b in zip(theirs, ours, strict=True))
        attention = max(
            (a.self_attn.o_proj.weight - b.self_attn.o_proj.weight).abs().max().item() for a, b in zip(theirs, ours)
        )
    return {
        "vllm": version("vllm"),
        "plugin": sorted(plugin),
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "widths": [layer.mlp.down_proj.weight.shape[1] for layer in theirs],
        "worst_ffn": worst,
        "worst_attention_weight": attention,
    }


def probe_llama_cpp(folder: str, name: str, sources: str) -> dict[str, Any]:
    """llama.cpp: its converter makes GGUF files of language model and vision tower, and it runs the former."""
    import xllamacpp

    sys.path[:0] = [sources, f"{sources}/gguf-py"]
    from conversion.base import TextModel

    # The converter knows tokenizers by a hash of what published ones answer; the embedded model's is not among them.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    place = Path(folder)
    files = {"text": place / f"{name}.gguf", "vision": place / f"{name}-vision.gguf"}
    for kind, file in files.items():
        switches = ["--mmproj"] if kind == "vision" else []
        sys.argv = ["convert", str(place / name), "--outfile", str(file), "--outtype", "f32", *switches]
        runpy.run_path(f"{sources}/convert_hf_to_gguf.py", run_name="__main__")

    ids = torch.load(place / "text.pt")["input_ids"][0].tolist()
    reference = torch.load(place / "reference.pt")["text"]
    params = xllamacpp.CommonParams()
    params.model.path = str(files["text"])
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 256, 1, 1
    asked = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "logprobs": 20}
    (choice,) = xllamacpp.Server(params).handle_completions(asked)["choices"]
    expected = reference["logits"][0, -1].log_softmax(-1)
    found = {entry["id"]: entry["logprob"] for entry in choice["logprobs"]["content"][0]["top_logprobs"]}
    return {
        "sizes": {kind: file.stat().st_size for kind, file in files.items()},
        "same_token": max(found, key=found.__getitem__) == int(expected.argmax()),
        "worst_log_probability": max(abs(value - expected[token].item()) for token, value in found.items()),
    }


PROBES = {"lop": probe_lop, "lmms_eval": probe_lmms_eval, "vllm": probe_vllm, "llama_cpp": probe_llama_cpp}


if __name__ == "__main__":
    main()
