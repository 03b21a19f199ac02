"""A model that never is in memory as a whole: its decoder layers are read from the checkpoint one at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from lop.model.adapter import QwenVL, load_processor, place_and_dtype, told_in_one_line
from lop.model.backbone import Layer
from lop.model.elastic import ElasticFfn
from lop.model.sources import family_of
from lop.storage.headers import read_tensors


class StreamedModel:
    """A dense checkpoint with its vision tower and embeddings in memory, and its decoder layers on disk.

    Args:
        path: the checkpoint's folder.
        device, dtype: as in `lop.model.adapter.open_model`.

    Raises:
        LopError: the folder holds no checkpoint that LOP takes, or a damaged one, or no processor.
    """

    def __init__(self, path: Path, *, device: str = "auto", dtype: str = "auto") -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig

        self._path, self._family = path, family_of(path)
        self._device, self._dtype = place_and_dtype(device, dtype, path)
        tensors = read_tensors(path)
        self._stored = {self._family.parameter(name): (info.file, name) for name, info in tensors.items()}
        with told_in_one_line(path):
            # Buffers are computed, not stored, and small.
            with init_empty_weights(include_buffers=False):
                network = self._family.network_class()(AutoConfig.from_pretrained(path))
            self._network: Any = network.eval().requires_grad_(False)
            self.model = QwenVL(network, load_processor(path))
            for part in self._family.resident:
                self._fill(part)

    def layers(self, order: np.ndarray, groups: np.ndarray | None = None) -> Iterator[Layer]:
        """Each decoder layer with an `ElasticFfn` in the order [L, F]; it is not kept when the next one is asked for.

        Args:
            groups: [L, K] the order of its groups of heads; that of the checkpoint if None.

        Raises:
            LopError: a tensor is missing or damaged.
        """
        for index, (layer, dense) in enumerate(zip(self.model.layers, self.model.ffns, strict=True)):
            with told_in_one_line(self._path):
                self._fill(f"{self._family.backbone}.layers.{index}")
            elastic = ElasticFfn.replacing(dense)
            elastic.sort(torch.from_numpy(order[index]))
            self.model.replace_ffn(index, elastic)
            lean = self.model.lean_layer(index)
            if groups is not None:
                lean.heads.sort(torch.from_numpy(groups[index]))
            yield lean
            self.model.replace_ffn(index, cast(nn.Module, dense))
            layer.to("meta")

    def _fill(self, prefix: str) -> None:
        """Reads a module's parameters."""
        from accelerate.utils import set_module_tensor_to_device

        module = self._network.get_submodule(prefix)
        for name, _ in list(module.named_parameters()):
            file, stored = self._stored[f"{prefix}.{name}"]
            with safe_open(file, framework="pt") as opened:
                # A copy, as sorting changes it in place and the file is mapped.
                value = opened.get_tensor(stored).clone()
            set_module_tensor_to_device(module, name, self._device, value=value, dtype=self._dtype)
        module.to(self._device)
