"""The pruned model that learns: which of its weights do, and what they come to as a checkpoint has them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lop.errors import LopError
from lop.model.adapter import Ffn, QwenVL, load_model, open_model
from lop.model.dtypes import DTYPES
from lop.model.sources import family_of
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
        backbone: what learns; of its parameters those that require gradients.

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
        family, kind = family_of(folder), self.shipped.model.dtype
        self._settings = settings
        # Weights that learn are read as they are stored: nothing is lost to the dtype that is computed in.
        network = open_model(folder, device=device, dtype=dtype if settings.lora_rank else "float32")
        learner = QwenVL(network, self.shipped.processor)
        _narrow(learner, widths, groups)
        self.backbone: Any = learner.backbone
        self.backbone.embed_tokens = nn.Identity()  # Of no use where embeddings are given.
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

    def _merged(self) -> Iterator[tuple[str, Tensor]]:
        if not self._settings.lora_rank:
            yield from ((name, value) for name, value in self.backbone.named_parameters() if value.requires_grad)
            return
        for name, module in self.backbone.named_modules():
            if hasattr(module, "get_delta_weight"):
                yield f"{name}.weight", module.base_layer.weight.float() + module.get_delta_weight(_ADAPTER).float()

    def _learning(self, ffn: str) -> list[str]:
        """The parameters that learn, before there are adapters: of FFNs, or of all layers and the last norm."""
        of_layers = [name for name in self._names if name.startswith("layers.") and self._has_any(name)]
        if self._settings.weights == "ffn":
            return [name for name in of_layers if name.split(".")[2] == ffn]
        return [*of_layers, "norm.weight"]

    def _has_any(self, name: str) -> bool:
        """Whether there is anything in a parameter: not in those of a part that keeps nothing."""
        return bool(self.backbone.get_parameter(name).numel())

    def _linears(self, ffn: str) -> list[str]:
        """The modules that get adapters."""
        modules = {name.removesuffix(".weight") for name in self._learning(ffn) if name.endswith(".weight")}
        return sorted(name for name in modules if isinstance(self.backbone.get_submodule(name), nn.Linear))


class Reader(nn.Module):
    """A backbone with the states between layers that are matched: one module, as `accelerate` wants it.

    Args:
        layers: after which the states are wanted.
    """

    def __init__(self, backbone: nn.Module, layers: Sequence[int]) -> None:
        super().__init__()
        self.backbone = backbone
        self._layers = tuple(layers)

    def forward(self, embeddings: Tensor, positions: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """The normed last states [B, T, H], then those after each layer of `layers`.

        Args:
            embeddings: [B, T, H].
            positions: [3, B, T].
            mask: [B, T], 1 where there are tokens; None if everywhere.
        """
        with _seen(self.backbone, self._layers) as states:
            out = self.backbone(
                inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=False
            ).last_hidden_state
        return out, *(states[layer] for layer in self._layers)


@contextmanager
def _seen(backbone: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What some layers give, as the block is left."""
    states: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [backbone.layers[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


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
