"""What a user of transformers alone does with a checkpoint; run in a process of its own, as `test_formats` says.

Reads a JSON file of checkpoints and inputs, and prints as JSON what it saw. Works in any transformers that knows
Qwen2.5-VL: `benchmarks/loaders.py` runs it in old ones.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

torch.set_num_threads(1)


def main(task: Path) -> None:
    """Goes through the checkpoints."""
    asked = json.loads(task.read_text())
    inputs = torch.load(asked["inputs"])
    seen = {
        name: use(Path(path), inputs, remote=name != "padded", others=asked["others"])
        for name, path in asked["checkpoints"].items()
    }
    assert "lop" not in sys.modules
    print(json.dumps(seen))


def use(path: Path, inputs: dict[str, torch.Tensor], *, remote: bool, others: bool) -> dict[str, Any]:
    """Loads, generates, saves and loads again; with other libraries (`others`), trains an adapter and quantises."""
    model = load(path, remote=remote)
    known = inspect.signature(model.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in known}
    # transformers up to 4.51 has the layers one step further up.
    backbone = getattr(model.model, "language_model", model.model)
    seen = {
        "is_qwen": isinstance(model, Qwen2_5_VLForConditionalGeneration),
        "class": type(model).__name__,
        "widths": [layer.mlp.down_proj.in_features for layer in backbone.layers],
    }
    logits = run(model, inputs)
    torch.save(logits, path.with_suffix(".logits"))
    seen["generated"] = generate(model, inputs)
    again = path.with_name(f"{path.name}-again")
    model.save_pretrained(again)
    seen["round_trip"] = (run(load(again, remote=remote), inputs) - logits).abs().max().item()
    for name, check in {"adapter": adapt, "int8": quantise}.items() if others else ():
        try:
            seen[name] = check(load(path, remote=remote), path, inputs, logits)
        except ImportError as error:
            seen[name] = f"not installed: {error.name}"
    return seen


def adapt(model: Any, path: Path, inputs: dict[str, torch.Tensor], before: torch.Tensor) -> dict[str, float]:
    """Trains LoRA matrices on every FFN for a few steps, saves them, and puts them on a fresh model."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    folder = path.with_name(f"{path.name}-adapter")
    adapted.save_pretrained(folder)
    after = run(adapted.eval(), inputs)
    restored = PeftModel.from_pretrained(load(path, remote="auto_map" in (path / "config.json").read_text()), folder)
    merged = restored.eval().merge_and_unload()
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "moved": (after - before).abs().max().item(),
        "restored": (run(merged, inputs) - after).abs().max().item(),
    }


def quantise(model: Any, _: Path, inputs: dict[str, torch.Tensor], before: torch.Tensor) -> dict[str, Any]:
    """Weights of every linear layer of the backbone in int8."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model.language_model, Int8WeightOnlyConfig())
    weight = model.model.language_model.layers[0].mlp.down_proj.weight
    return {
        "type": type(weight).__name__,
        "agreement": (run(model, inputs).argmax(-1) == before.argmax(-1)).float().mean().item(),
        "generated": generate(model, inputs),
    }


def load(path: Path, *, remote: bool) -> Any:
    """As the documentation of transformers says; remote code only where it is needed."""
    options: dict[str, Any] = {"trust_remote_code": True} if remote else {}
    is_old = int(transformers.__version__.partition(".")[0]) < 5
    options["torch_dtype" if is_old else "dtype"] = torch.float32
    return AutoModelForImageTextToText.from_pretrained(path, **options).eval()


@torch.inference_mode()
def run(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits [1, T, V]."""
    return model(**inputs).logits.clone()


def generate(model: Any, inputs: dict[str, torch.Tensor]) -> list[int]:
    """The token ids that greedy decoding adds."""
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
