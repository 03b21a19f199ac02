"""How fast an allocation is evaluated, against naive ways and against the machine: `python benchmarks/evaluator.py`.

Prints tables, and as the last line one JSON object. The two naive evaluators are written here from transformers as it
comes: pruned neurons are zeroed in the weights, and `generate` runs the whole model, vision tower included. One takes a
question at a time and prepares its image each time, as pipelines around lmms-eval do; the other batches by length as we
do, and finds its inputs prepared. The allocations are drawn at random around the targets of a search.

`--model 7b` builds Qwen2.5-VL-7B at its true shapes with random weights, for a GPU.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
import torch
from photographs import SHAPES, hub_config
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from lop.model.adapter import QwenVL, load_model
from lop.model.elastic import ElasticModel
from lop.model.encoding import Encoded, encode, on_device
from lop.model.find import assets
from lop.model.importance import activation
from lop.model.importance import order as neuron_order
from lop.model.samples import Sample, load_sample_sets, prompt_text
from lop.model.statistics import calibrate
from lop.run.config import find_config, load_config
from lop.search.evaluator import Evaluator
from lop.search.racing import Candidate
from lop.space.allocation import Allocation, Space, dense, project, uniform

_CONFIGS = {"tiny": "tiny", "7b": "qwen2_5_vl_7b"}
# Parts of a profile by the names of torch's operators, and on a GPU of kernels.
_PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "gemm", "cutlass", "nvjet"),
    "attention": ("attention", "flash", "fmha"),
    "norms": ("rms_norm", "layer_norm", "aten::pow", "aten::mean", "aten::rsqrt"),
    "activation": ("silu",),
    "head's softmax": ("logsumexp", "aten::exp", "aten::max", "aten::amax", "aten::scatter"),
}


@dataclass(frozen=True)
class Generated:
    """One naive evaluation: its seconds, and the tokens that it wrote for each sample."""

    seconds: float
    tokens: list[list[int]]


def main() -> None:
    """Measures everything and prints it."""
    parser = argparse.ArgumentParser(description="How fast an allocation is evaluated.")
    parser.add_argument("--model", choices=sorted(_CONFIGS), default="tiny")
    parser.add_argument("--device", default="auto", help="auto (the first GPU if there is one), or what torch calls it")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--samples", type=int, default=720, help="reward samples, at most")
    parser.add_argument("--allocations", type=int, default=9, help="drawn from the search's mix of targets")
    parser.add_argument("--naive", type=int, default=2, help="of these, how many the naive evaluators evaluate")
    parser.add_argument("--threads", type=int, default=1, help="torch's, on a CPU")
    parser.add_argument("--batch-tokens", type=int, help="of one batch; the model's config says, by default")
    parser.add_argument("--compile", action="store_true", help="fuse the FFNs' activations by torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps({"benchmark": "evaluator", "model": options.model, **measure(options)}))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, as the last line has them."""
    config = load_config(find_config(_CONFIGS[options.model]))
    batch_tokens = options.batch_tokens or config.batch_tokens
    samples = load_sample_sets(assets() / "samples").reward[: options.samples]
    model = load(options.model, options.device, options.dtype)
    neurons = model.ffns[0].down_proj.weight.shape[1]
    space = Space(len(model.ffns), neurons, config.granularity, config.max_ratio)
    calibration = encode(model, load_sample_sets(assets() / "samples").calibration[:100], batch_tokens=batch_tokens)
    order = neuron_order(activation(calibrate(model, calibration)))
    allocations = draw(space, config.search.targets.ratios, config.search.step, options.allocations)
    chosen = allocations[:: max(1, len(allocations) // options.naive)][: options.naive]

    print(f"{options.model} on {describe(model)}, {options.threads} threads: {len(samples)} samples", flush=True)
    singles, batches = run_naive(model, order, samples, chosen, batch_tokens)
    elastic = ElasticModel(model, order)
    if options.compile:
        elastic.compile()
    started = time.perf_counter()
    encoded = encode(model, samples, batch_tokens=batch_tokens)
    encode_seconds = time.perf_counter() - started
    evaluator = Evaluator(elastic, encoded)

    ours = statistics.mean(clock(lambda a=each: evaluator.evaluate(Candidate(a)), model) for each in allocations)  # type: ignore[misc]
    whole = clock(lambda: evaluator.evaluate(Candidate(dense(space))), model, repeats=5)
    half = clock(lambda: evaluator.evaluate(Candidate(uniform(space, space.budget(0.5)))), model, repeats=5)
    agreement = [
        agree(elastic, evaluator, encoded, samples, model, allocation, naive)
        for allocation, *naives in zip(chosen, singles, batches)
        for naive in naives
    ]
    single, many = (statistics.mean(run.seconds for run in runs) for runs in (singles, batches))
    rate = gemm_rate(model)
    arithmetic = statistics.mean(flops(elastic, allocation, encoded) for allocation in allocations)
    report = {
        "device": describe(model),
        "samples": len(samples),
        "tokens": sum(len(batch) for batch in encoded.batches),
        "encode_seconds": encode_seconds,
        "evaluation_seconds": ours,
        "naive_seconds": single,
        "batched_seconds": many,
        "speedup_vs_naive": single / ours,
        "speedup_vs_batched": many / ours,
        "same_answers": min(agreement) == 1,
        "agreement": min(agreement),
        "gemm_gflops": rate / 1e9,
        "gemm_share": arithmetic / ours / rate,
        "gemm_share_dense": flops(elastic, dense(space), encoded) / whole / rate,
        "dense_seconds": whole,
        "time_ratio_at_50": half / whole,
        "switch_ms": 1000 * switch_seconds(elastic),
        "profile": profile_parts(evaluator, uniform(space, space.budget(0.5)), model),
    }
    for name, value in report.items():
        lines = value.items() if isinstance(value, dict) else [("", value)]
        for part, number in lines:
            print(f"{name} {part}".ljust(36), f"{number:.4g}" if isinstance(number, float) else number)
    return report


def load(name: str, device: str, dtype: str) -> QwenVL:
    """The embedded model, or the 7B's shapes with random weights and the embedded model's tokenizer."""
    if name == "tiny":
        return load_model(assets() / "model", device=device, dtype=dtype)
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    kind = getattr(torch, ("bfloat16" if place.type == "cuda" else "float32") if dtype == "auto" else dtype)
    small = load_model(assets() / "model", device="cpu")
    built = Qwen2_5_VLConfig.from_dict(hub_config(SHAPES[name]))
    with torch.device(place):
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration._from_config(built, dtype=kind).eval().requires_grad_(False)
    images = small.processor.image_processor
    images.patch_size, images.merge_size, images.temporal_patch_size = 14, 2, 2
    images.size = {"shortest_edge": 256 * 28 * 28, "longest_edge": 1280 * 28 * 28}
    return QwenVL(model, small.processor)


def draw(space: Space, targets: Sequence[float], step: float, count: int) -> list[Allocation]:
    """Allocations that a tree's first moves would make, at targets spread over the search's."""
    random = np.random.default_rng(0)
    budgets = [space.budget(target) for target in np.quantile(targets, np.linspace(0, 1, count)).round(6)]
    moves = random.uniform(-step, step, (count, space.layers))
    return [project(space.ratio(budget) + move, space, budget) for budget, move in zip(budgets, moves)]


def run_naive(
    model: QwenVL, order: np.ndarray, samples: Sequence[Sample], chosen: Sequence[Allocation], batch_tokens: int
) -> tuple[list[Generated], list[Generated]]:
    """The chosen allocations by both naive evaluators: a question at a time, and in batches. Leaves the model dense."""
    weights = [[w.clone() for w in (f.gate_proj.weight, f.up_proj.weight, f.down_proj.weight)] for f in model.ffns]
    longest = 1 + max(len(answer_tokens(model, sample)) for sample in samples)
    groups = prepared_batches(model, samples, batch_tokens)
    singles, many = [], []
    for allocation in chosen:
        mask(model, weights, order, allocation)
        started = time.perf_counter()
        tokens = [generate(model, inputs_of(model, [sample]), longest)[0] for sample in samples]
        singles.append(Generated(time.perf_counter() - started, tokens))
        generate(model, groups[0][1], longest)
        started = time.perf_counter()
        written = {i: row for indices, inputs in groups for i, row in zip(indices, generate(model, inputs, longest))}
        many.append(Generated(time.perf_counter() - started, [written[index] for index in range(len(samples))]))
    for ffn, (gate, up, down) in zip(model.ffns, weights):
        ffn.gate_proj.weight.copy_(gate), ffn.up_proj.weight.copy_(up), ffn.down_proj.weight.copy_(down)
    return singles, many


def mask(model: QwenVL, weights: Sequence[Sequence[torch.Tensor]], order: np.ndarray, allocation: Allocation) -> None:
    """Zeroes the pruned neurons' weights."""
    for layer, (ffn, (gate, up, down)) in enumerate(zip(model.ffns, weights)):
        keep = torch.zeros(order.shape[1], dtype=gate.dtype)
        keep[order[layer, : allocation.widths[layer]]] = 1
        keep = keep.to(gate.device)
        ffn.gate_proj.weight.copy_(gate * keep[:, None])
        ffn.up_proj.weight.copy_(up * keep[:, None])
        ffn.down_proj.weight.copy_(down * keep)


def inputs_of(model: QwenVL, samples: Sequence[Sample]) -> Any:
    """What the processor makes of images and questions, padded on the left."""
    texts = [
        model.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt_text(sample)}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for sample in samples
    ]
    images = [Image.open(BytesIO(sample.image)).convert("RGB") for sample in samples]
    return model.processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt").to(
        model.device
    )


def prepared_batches(model: QwenVL, samples: Sequence[Sample], batch_tokens: int) -> list[tuple[list[int], Any]]:
    """Inputs by batches of similar length: the samples' indices with what the processor makes of them."""
    lengths = [inputs_of(model, [sample])["input_ids"].shape[1] for sample in samples]
    order = sorted(range(len(samples)), key=lambda index: lengths[index])
    size = max(1, batch_tokens // int(statistics.mean(lengths)))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return [(group, inputs_of(model, [samples[index] for index in group])) for group in groups]


@torch.inference_mode()
def generate(model: QwenVL, inputs: Any, longest: int) -> list[list[int]]:
    """The tokens that greedy generation writes for each prompt, end of turn included."""
    end = model.processor.tokenizer.eos_token_id
    output = model.model.generate(**inputs, max_new_tokens=longest, do_sample=False, eos_token_id=end, pad_token_id=end)
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def answer_tokens(model: QwenVL, sample: Sample) -> list[int]:
    """The right answer's tokens, without the end of turn."""
    return list(model.processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def agree(
    elastic: ElasticModel,
    evaluator: Evaluator,
    encoded: Encoded,
    samples: Sequence[Sample],
    model: QwenVL,
    allocation: Allocation,
    naive: Generated,
) -> float:
    """The share of samples for which both write the same first token and find the same answers exactly right."""
    end = model.processor.tokenizer.eos_token_id
    same = np.ones(len(samples), dtype=bool)
    with elastic.pruned(allocation):
        correct = evaluator.scores().correct
        backbone = elastic.backbone
        for batch in on_device(encoded.batches, model.device):
            states = backbone.answers(batch.embeddings, batch.rotation, batch.groups, batch.tails)
            likeliest = backbone.logits(states[batch.places]).argmax(1).tolist()
            for owner, token in reversed(list(zip(batch.samples.tolist(), likeliest))):
                # Going backwards, what stays is the verdict on the answer's first token.
                same[owner] = token == naive.tokens[owner][0]
    exact = [tokens == [*answer_tokens(model, sample), end] for tokens, sample in zip(naive.tokens, samples)]
    return float((same & (correct == exact)).mean())


def clock(call: Callable[[], object], model: QwenVL, *, repeats: int = 3) -> float:
    """The median seconds of a call, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(model)
        started = time.perf_counter()
        call()
        synchronize(model)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def synchronize(model: QwenVL) -> None:
    """Waits for the GPU, if that is where the model is."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def gemm_rate(model: QwenVL) -> float:
    """Operations per second of a large square matrix product of the model's dtype."""
    size = 8192 if model.device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=model.device, dtype=model.model.dtype) for _ in range(2))
    return 2 * size**3 / clock(lambda: left @ right.T, model, repeats=5)


def flops(elastic: ElasticModel, allocation: Allocation, encoded: Encoded) -> float:
    """Operations that the backbone's matrix products and causal attention need for one evaluation.

    The last layer's queries, output and FFN are needed at the answers alone.
    """
    backbone = elastic.backbone
    hidden, heads = backbone.norm.shape[0], backbone.layers[0].heads
    queries, keys = heads.columns, heads.width * heads.size
    total = 0
    for batch in encoded.batches:
        for number, width in enumerate(allocation.widths, start=1):
            last = number == len(allocation.widths)
            asked = len(batch.tails) if last else len(batch)
            total += len(batch) * hidden * 2 * keys + asked * (2 * hidden * queries + 3 * hidden * width)
            pairs = (
                group.count * (group.tail * group.length if last else group.length * (group.length + 1) // 2)
                for group in batch.groups
            )
            total += 2 * queries * sum(pairs)
    return 2.0 * total


def switch_seconds(elastic: ElasticModel, layers: int = 28) -> float:
    """The median seconds that a model of 28 layers takes from one allocation to the next."""
    deep = copy.copy(elastic)
    first = elastic.backbone.layers[0]
    copies = tuple(replace(first, ffn=copy.copy(first.ffn)) for _ in range(layers))
    deep.backbone = replace(elastic.backbone, layers=copies)
    neurons = deep.widths[0]
    choices = [Allocation((neurons // part,) * layers) for part in (1, 2)]
    seconds = []
    for number in range(200):
        started = time.perf_counter()
        deep.prune(choices[number % 2])
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def profile_parts(evaluator: Evaluator, allocation: Allocation, model: QwenVL) -> dict[str, float]:
    """Shares of an evaluation's time by part: on a GPU of the kernels' time, on a CPU of the operators'."""
    on_gpu = model.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        evaluator.evaluate(Candidate(allocation))
        synchronize(model)
    shares = dict.fromkeys([*_PARTS, "rest"], 0.0)
    for event in recorded.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        part = next((part for part, names in _PARTS.items() if any(name in event.key for name in names)), "rest")
        shares[part] += spent
    whole = sum(shares.values())
    return {part: spent / whole for part, spent in shares.items()}


def describe(model: QwenVL) -> str:
    """The device and the dtype."""
    kind = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    return f"{kind}, {str(model.model.dtype).removeprefix('torch.')}"


if __name__ == "__main__":
    main()
