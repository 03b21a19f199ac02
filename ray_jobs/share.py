"""Torch tensors that all processes of a machine read from one place in memory: Ray's object store."""

import warnings
from typing import Any

import numpy as np
import ray
import torch
from ray.util import deregister_serializer, register_serializer

_Packed = tuple[np.ndarray, torch.dtype, tuple[int, ...]]


def put_shared(value: Any) -> ray.ObjectRef:
    """Puts an object that holds CPU tensors, such as a model, into the object store.

    `ray.get` on any machine gives the object with its tensors in the store's own memory, once for each machine however
    many processes get it. They are read-only, though torch does not know it: nothing may write to them.

    Ray does this for numpy arrays; torch's own way to pickle would copy every tensor into every process.
    """
    register_serializer(torch.Tensor, serializer=_pack, deserializer=_unpack)
    try:
        return ray.put(value)
    finally:
        deregister_serializer(torch.Tensor)


def _pack(tensor: torch.Tensor) -> _Packed:
    flat = tensor.detach().contiguous().reshape(-1)
    # As bytes: numpy has no bfloat16.
    return flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape)


def _unpack(packed: _Packed) -> torch.Tensor:
    data, dtype, shape = packed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(data).view(dtype).reshape(shape)
