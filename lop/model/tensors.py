"""The FFN tensors of a checkpoint's language backbone, and what the whole of it comes to."""

from collections import defaultdict
from collections.abc import Mapping

from lop.errors import LopError
from lop.model.families.registry import FAMILIES
from lop.space.size import ModelSize
from lop.storage.headers import TensorInfo


def model_size(tensors: dict[str, TensorInfo]) -> ModelSize:
    """Sums up a dense checkpoint.

    Raises:
        LopError: its decoder layers have no FFN weights, or not all of one width and of as many bytes a number.
    """
    down = down_projections(tensors)
    widths = {info.shape[1] for _, info in down}
    if not widths:
        raise LopError("the checkpoint has no decoder layers with gate_proj, up_proj and down_proj")
    if len(widths) > 1:
        raise LopError(f"the checkpoint is pruned already: its FFN widths differ ({min(widths)} to {max(widths)})")
    if len({info.item_bytes for name, info in tensors.items() if ffn_part(name)}) > 1:
        raise LopError("the checkpoint's FFN weights are of several types: store them all in one")
    _, first = down[0]
    return ModelSize(
        layers=len(down),
        neurons=first.shape[1],
        parameters=sum(info.parameters for info in tensors.values()),
        bytes=sum(info.bytes for info in tensors.values()),
        neuron_parameters=3 * first.shape[0],
        neuron_bytes=3 * first.shape[0] * first.item_bytes,
    )


def group_parameters(tensors: Mapping[str, TensorInfo], groups: int) -> int:
    """What one of a layer's key/value heads holds with the query heads that share it, biases included.

    Args:
        groups: key/value heads of a layer.

    Raises:
        LopError: the layers' attention differs, or is not in so many equal groups.
    """
    sizes: dict[int, int] = defaultdict(int)
    for name, info in tensors.items():
        if found := attention_tensor(name):
            sizes[found[0]] += info.parameters
    if len(set(sizes.values())) != 1 or max(sizes.values()) % groups:
        raise LopError(f"the checkpoint's attention is not the same {groups} groups in all layers")
    return max(sizes.values()) // groups


def attention_tensor(name: str) -> tuple[int, str, str] | None:
    """Of a tensor of the language backbone's attention its layer, which projection it is, and `weight` or `bias`."""
    return next((found for family in FAMILIES.values() if (found := family.attention_tensor(name))), None)


def ffn_part(name: str) -> str | None:
    """Which FFN matrix of the language backbone a tensor is, if any; the vision tower's are not."""
    found = _ffn_tensor(name)
    return found[1] if found else None


def down_projections(tensors: Mapping[str, TensorInfo]) -> list[tuple[str, TensorInfo]]:
    """The layers' `down_proj` weights [H, neurons] with their names, first layer to last.

    Raises:
        LopError: one of them is no matrix.
    """
    down = [(name, info) for name, info in tensors.items() if ffn_part(name) == "down_proj"]
    for name, info in down:
        if len(info.shape) != 2:
            raise LopError(f"{info.file} is damaged: {name} is no matrix, its shape is {info.shape}")
    return sorted(down, key=lambda item: ffn_layer(item[0]))


def out_projections(tensors: Mapping[str, TensorInfo]) -> list[tuple[str]]:
    """The names of the layers' `o_proj` weights, first layer to last."""
    found = {name: at for name in tensors if (at := attention_tensor(name)) and at[1:] == ("o_proj", "weight")}
    return [(name,) for name in sorted(found, key=lambda name: found[name][0])]


def ffn_layer(name: str) -> int:
    """The decoder layer that an FFN tensor belongs to."""
    found = _ffn_tensor(name)
    assert found
    return found[0]


def _ffn_tensor(name: str) -> tuple[int, str] | None:
    """Layer and part by whichever family knows the name: in no other it means something else."""
    return next((found for family in FAMILIES.values() if (found := family.ffn_tensor(name))), None)
