"""The README of a pruned checkpoint: a model card that says what it is, how it was made and how to load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lop.model.families.family import Family

CARD = "README.md"
_LOADING = {
    "hf": """Each layer's FFN has a width of its own, so the folder brings its modelling file, `modeling_lop.py`, and
transformers must be allowed to run it: `trust_remote_code=True`. Without, it ends in an error, and what that recommends
(`allow_global_per_layer_attribute_access`, `ignore_mismatched_sizes`) would build other layers than these: leave it.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("PATH", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("PATH")
```

Where LOP is installed, {without} no remote code. For tools that cannot run any, export it again
with `--format padded`.""",
    "padded": """All FFNs are as wide as the widest one, filled up with zeros: whatever loads {family} loads it.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("PATH")
processor = AutoProcessor.from_pretrained("PATH")
```""",
}
_LOADING["dense"] = _LOADING["padded"].replace("All FFNs are as wide as the widest one, filled up with zeros: w", "W")
_QUANTISED = """
Weights of the language backbone's linear layers have {bits} bits, by groups of {group} with a scale and a zero point
each, in the format `pack-quantized` of `compressed-tensors`, which has to be installed. transformers unpacks them when
it loads the model.
"""
_TRUE = """Each layer's FFN has a width of its own: `qwen2vl.feed_forward_length` is an array, which an unchanged
llama.cpp does not heed in this architecture; it refuses the file for the shape of a tensor.

"""
_GGUF = """{warning}llama.cpp runs it: {files}.

```console
$ {command} -p "What is it?"
```"""
_CARD = """---
{front}
---

# {name}, {removed}

{parameters:,} parameters, {size:,} bytes. {untouched} are the dense model's.
{quantised}
## Loading

{loading}

## How it was made

By LOP {version} (structured pruning, arXiv 2506.12826): {made}.
`lop.json` has the widths, what they were made from, and the SHA-256 of each file; `lop inspect` checks these.

{rows}

## Licence

That of the dense model, {name}: {licence}.
"""


def model_card(source: Path, family: Family, manifest: Mapping[str, Any], *, parameters: int, size: int) -> bytes:
    """The card, with the YAML front matter that model hubs read.

    Args:
        source: the dense checkpoint's folder: its own card tells the licence.
        family: of both.
        manifest: of the new checkpoint; its hashes are not needed.
        parameters: of all its tensors.
        size: of all its tensors, in bytes.
    """
    origin, licence = str(manifest.get("source", source)), read_licence(source)
    front = {
        **licence,
        **({"base_model": origin} if _is_hub_id(origin) else {}),
        "library_name": "gguf" if "gguf" in manifest else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lop", "pruned", family.model_type],
    }
    made = [f"{key} {manifest[key]}" for key in ("format", "method", "importance", "recovery") if key in manifest]
    if "target" in manifest:
        made.append(f"target {manifest['target']:.4f}")
    if "distilled" in manifest:
        made.append(f"{sum(record['tokens'] for record in manifest['distilled']):,} tokens read in distillation")
    return _CARD.format(
        front="\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),
        name=origin if _is_hub_id(origin) else Path(origin).name,
        removed=_removed(manifest),
        parameters=parameters,
        size=size,
        untouched=_untouched(manifest),
        quantised=_QUANTISED.format(**manifest["quantised"]) if "quantised" in manifest else "",
        loading=_loading(family, manifest),
        version=manifest.get("version", ""),
        made=", ".join(made),
        rows=_rows(manifest),
        licence=", ".join(licence.values()) or "its folder does not name any",
    ).encode()


def _removed(manifest: Mapping[str, Any]) -> str:
    """What the dense model had more."""
    widths, layers = manifest["widths"], manifest.get("layers")
    if layers:
        return f"{layers['of'] - len(layers['kept'])} of its {layers['of']} layers removed"
    neurons = f"{1 - sum(widths) / (len(widths) * manifest['neurons']):.1%} of its FFN neurons"
    groups, whole = manifest.get("groups"), len(widths) * manifest.get("dense_groups", 0)
    return f"{neurons} and {1 - sum(groups) / whole:.1%} of its attention pruned" if groups else f"{neurons} pruned"


def _rows(manifest: Mapping[str, Any]) -> str:
    """The table of what each layer keeps."""
    widths, neurons, groups = manifest["widths"], manifest["neurons"], manifest.get("groups")
    heading = ["layer", f"neurons of {neurons}", "pruned"]
    rows = [[f"{layer}", f"{width}", f"{1 - width / neurons:.1%}"] for layer, width in enumerate(widths)]
    if groups:
        heading.append(f"groups of attention heads of {manifest['dense_groups']}")
        rows = [[*row, f"{kept}"] for row, kept in zip(rows, groups, strict=True)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [heading, ["---:"] * len(heading), *rows])


def _untouched(manifest: Mapping[str, Any]) -> str:
    """What no step has changed."""
    quantised = manifest.get("quantised")
    if not quantised:
        changed = any(name in manifest for name in ("distilled", "layers", "groups"))
        return "Vision tower, embeddings and head" if changed else "Vision tower and attention"
    return "Embeddings and head" if quantised["vision"] else "Vision tower, embeddings and head"


def _loading(family: Family, manifest: Mapping[str, Any]) -> str:
    if "gguf" not in manifest:
        return _LOADING["dense" if "layers" in manifest else manifest["format"]].format(
            family=family.name,
            without='`lop.load("PATH")` and vLLM need' if family.in_vllm else '`lop.load("PATH")` needs',
        )
    language, *tower = manifest["gguf"]["files"]
    seen = [f"llama-mtmd-cli -m {language} --mmproj {file} --image photo.jpg" for file in tower]
    return _GGUF.format(
        warning=_TRUE if len(set(manifest["gguf"]["stored"])) > 1 else "",
        files=" and ".join(f"`{name}`" for name in (language, *tower)) + ("" if tower else ", which reads text alone"),
        command=seen[0] if seen else f"llama-cli -m {language}",
    )


def read_licence(checkpoint: Path) -> dict[str, str]:
    """What a checkpoint's own card says of its licence: `license`, `license_name`, `license_link`, as far as there."""
    try:
        before, front, _ = (checkpoint / CARD).read_text(encoding="utf-8").split("---\n", 2)
        said = yaml.safe_load(front)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if before or not isinstance(said, dict):
        return {}
    return {name: str(said[name]) for name in ("license", "license_name", "license_link") if said.get(name)}


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and not Path(name).exists()
