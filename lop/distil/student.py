"""The pruned model that learns: which of its weights do, and what they come to as a checkpoint has them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lop.errors import LopError
from lop.model.adapter import Ffn, QwenVL, load_model, open_model
from lop.model.backbone import Group
from lop.model.dtypes import DTYPES
from lop.model.families.family import Family
from lop.run.settings import DistilSettings
from lop.storage.headers import TensorInfo, read_tensors

_ADAPTER = "default"


class Student:
    """A pruned checkpoint twice in memory: as it ships, to be judged; and its backbone, which learns in float32.

    Embeddings, head and vision tower are the dense model's and stay so. Padding is left out: zeros stay zeros.

    Args:
        folder: one that LOP exported.
        widths: [L] neurons of each layer without padding.
        groups: [L] groups of attention heads of each layer without padding; None where all are kept.
        seed: of the adapters' start values, if there are any.

    Attributes:
        shipped: with the weights that `ship` was last given.
        network: of what learns, without a vision tower and embeddings of its own.
        backbone: the part of it that learns; of its parameters those that require gradients.

    Raises:
        LopError: the checkpoint is damaged, or adapters are wanted and `peft` is not installed.
    """

    def __init__(
        self,
        folder: Path,
        widths: Sequence[int],
        groups: Sequence[int] | None,
        settings: DistilSettings,
        *,
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
    ) -> None:
        self.shipped = load_model(folder, device=device, dtype=dtype)
        _narrow(self.shipped, widths, groups)
        family, kind = self.shipped.family, self.shipped.model.dtype
        self._settings = settings
        # Weights that learn are read as they are stored: nothing is lost to the dtype that is computed in.
        network = open_model(folder, device=device, dtype=dtype if settings.lora_rank else "float32")
        learner = QwenVL(network, self.shipped.processor)
        _narrow(learner, widths, groups)
        self.network, self.backbone = network, cast(Any, learner.backbone)
        for name in (family.tower, f"{family.backbone}.embed_tokens"):  # Of no use where embeddings are given.
            network.set_submodule(name, nn.Identity())
        network.set_submodule(family.head, self.shipped.head)
        self._names = _names_within(family.parameter, family.backbone, read_tensors(folder))
        if settings.lora_rank:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                _adapt(self.backbone, self._linears(family.ffn), settings.lora_rank)
        else:
            for name in self._learning(family.ffn):
                self.backbone.get_parameter(name).requires_grad_(True)
        for parameter in self.backbone.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else kind)

    @property
    def head(self) -> Tensor:
        """[V, H], which does not learn."""
        return self.shipped.head.weight  # type: ignore[return-value]

    def parameters(self) -> list[nn.Parameter]:
        """Those that learn."""
        return [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]

    def weights(self) -> dict[str, Tensor]:
        """What has been learnt, adapters merged: by the checkpoint's names, in its dtypes, in host memory."""
        found = {}
        for name, value in self._merged():
            stored, info = self._names[name]
            found[stored] = value.detach().to("cpu", DTYPES[info.dtype], copy=True).contiguous()
        return found

    @torch.no_grad()
    def ship(self, weights: Mapping[str, Tensor]) -> None:
        """Gives the model that is judged these weights, as `weights` gives them."""
        stored = {tensor: name for name, (tensor, _) in self._names.items()}
        for tensor, value in weights.items():
            self.shipped.backbone.get_parameter(stored[tensor]).copy_(value)

    def adapted_attention(self) -> list[str]:
        """The network's modules of attention that have adapters."""
        of_attention = f".{self.shipped.family.attention}."
        named = self.network.named_modules()
        return [name for name, module in named if of_attention in name and hasattr(module, "get_delta_weight")]

    def _merged(self) -> Iterator[tuple[str, Tensor]]:
        if not self._settings.lora_rank:
            yield from ((name, value) for name, value in self.backbone.named_parameters() if value.requires_grad)
            return
        for name, module in self.backbone.named_modules():
            if hasattr(module, "get_delta_weight"):
                yield f"{name}.weight", module.base_layer.weight.float() + module.get_delta_weight(_ADAPTER).float()

    def _learning(self, ffn: str) -> list[str]:
        """The parameters that learn, before there are adapters: of FFNs, or of all layers and the last norm."""
        layers = self.shipped.family.lean_backbone(self.network).layers
        silent = [layer.attention_norm for layer in layers if not layer.heads.width]
        parameters = {name: self.backbone.get_parameter(name) for name in self._names if name.startswith("layers.")}
        # Not those of an attention that keeps nothing, nor the norm before it: processes wait for a gradient of each.
        of_layers = [
            name for name, value in parameters.items() if value.numel() and not any(value is norm for norm in silent)
        ]
        if self._settings.weights == "ffn":
            return [name for name in of_layers if name.split(".")[2] == ffn]
        return [*of_layers, "norm.weight"]

    def _linears(self, ffn: str) -> list[str]:
        """The modules that get adapters."""
        modules = {name.removesuffix(".weight") for name in self._learning(ffn) if name.endswith(".weight")}
        return sorted(name for name in modules if isinstance(self.backbone.get_submodule(name), nn.Linear))


class Reader(nn.Module):
    """A student's backbone with the states between layers that are matched: one module, as `accelerate` wants it.

    It runs as `lop.model.backbone` does, in the dtype that the model is judged in: sequences lie end to end, nothing is
    padded.

    Args:
        layers: after which the states are wanted.
    """

    def __init__(self, student: Student, layers: Sequence[int]) -> None:
        super().__init__()
        self._passes = _Passes(student.network, student.shipped.family)
        self._adapted = tuple(student.adapted_attention())
        self._kind = student.shipped.model.dtype
        self._layers = tuple(layers)

    def forward(self, embeddings: Tensor, rotation: Tensor, groups: Sequence[Group]) -> tuple[Tensor, ...]:
        """The normed last states [N, H], then those after each layer of `layers`.

        Args:
            embeddings: [N, H].
            rotation: [N, D/2] complex, M-RoPE.
            groups: how many sequences of which length the N tokens are.
        """
        weights = {name: value.to(self._kind) for name, value in self._passes.named_parameters()}
        for name in self._adapted:  # The attention's are multiplied by together, so with adapters merged.
            delta = cast(Any, self._passes.network.get_submodule(name)).get_delta_weight(_ADAPTER)
            base = f"network.{name}.base_layer.weight"
            weights[base] = weights[base] + delta.to(self._kind)
        with torch.autocast(embeddings.device.type, enabled=False):
            return functional_call(self._passes, weights, (embeddings.to(self._kind), rotation, groups, self._layers))


class _Passes(nn.Module):
    """Builds the backbone of the weights that there are when it is called."""

    def __init__(self, network: nn.Module, family: Family) -> None:
        super().__init__()
        self.network, self._family = network, family

    def forward(
        self, embeddings: Tensor, rotation: Tensor, groups: Sequence[Group], layers: Sequence[int]
    ) -> tuple[Tensor, ...]:
        backbone = self._family.lean_backbone(self.network)
        # So that nothing is done in place, in layers before the first one that learns, either.
        x = embeddings.requires_grad_()
        seen = {}
        for layer, states in enumerate(backbone.hidden(x, rotation, groups)):
            x = states
            if layer in layers:
                seen[layer] = states
        return backbone.normed(x), *(seen[layer] for layer in layers)


def check_peft() -> None:
    """Looks whether adapters can be had.

    Raises:
        LopError: `peft` is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise LopError(
            "distil.lora_rank above zero needs peft: pip install peft, or pip install -e '.[distil]'; "
            "--set distil.lora_rank=0 learns full weights"
        ) from None


def _adapt(backbone: nn.Module, modules: Sequence[str], rank: int) -> None:
    """Puts an adapter beside each linear module; they change nothing before they have learnt."""
    check_peft()
    from peft import LoraConfig, inject_adapter_in_model

    # Scaled by 2, as is usual; the learning rate decides the rest.
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), lora_dropout=0.0)
    inject_adapter_in_model(config, backbone, adapter_name=_ADAPTER)


def _narrow(model: QwenVL, widths: Sequence[int], groups: Sequence[int] | None) -> None:
    """Takes the zeros off that pad FFNs and attention."""
    for layer, kept in zip(model.layers, groups or ()):
        attention = getattr(layer, model.family.attention)
        if len(attention.k_proj.weight) != kept * attention.head_dim:
            model.family.keep_groups(layer, kept)
    for ffn, width in zip(model.ffns, widths, strict=True):
        if ffn.down_proj.in_features == width:
            continue
        for part, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            _cut(ffn, part, axis, width)


def _cut(ffn: Ffn, part: str, axis: int, width: int) -> None:
    linear: nn.Linear = getattr(ffn, part)
    linear.weight = nn.Parameter(linear.weight.narrow(axis, 0, width).contiguous(), requires_grad=False)
    linear.out_features, linear.in_features = linear.weight.shape


def _names_within(
    parameter: Callable[[str], str], backbone: str, tensors: Mapping[str, TensorInfo]
) -> dict[str, tuple[str, TensorInfo]]:
    """By what the backbone calls its parameters, the checkpoint's names of them, and where they are."""
    named = ((parameter(name), name, info) for name, info in tensors.items())
    prefix = f"{backbone}."
    return {known.removeprefix(prefix): (name, info) for known, name, info in named if known.startswith(prefix)}
