"""transformers' own tests of Qwen2.5-VL (the model's, common ones, generation), run on the pruned class.

Its wheel brings none of them: TRANSFORMERS_SOURCE names a folder with the source of the version that is installed.
"""

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from transformers import Qwen2_5_VLForConditionalGeneration

import tests
from lop.model.families.remote_qwen2_5_vl import LopQwen2_5_VLForConditionalGeneration as Pruned

_SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not _SOURCE:
    pytest.skip("TRANSFORMERS_SOURCE names no source folder of transformers", allow_module_level=True)
# Its tests import each other as parts of a package `tests`, too, and this one has no module that they ask for.
tests.__path__.append(str(Path(_SOURCE) / "tests"))
sys.path.append(_SOURCE)

from tests.models.qwen2_5_vl import test_modeling_qwen2_5_vl as theirs  # noqa: E402

_WIDTHS = (24, 11)
_BASE = "builds transformers' base class alone, which has equal layers only"
_NOT_OURS = {
    "test_inherits_generation_mixin": "asks for the bases that the class names itself; it has the mixin by inheritance",
    "test_base_model_prefix_loads_base_weights": _BASE,
    "test_save_load_fast_init_from_base": _BASE,
    "test_save_load_fast_init_to_base": _BASE,
}


class _OnPruned(theirs.Qwen2_5_VLModelTest):  # type: ignore[misc]
    """The suite, with the pruned class for the model's own."""

    all_model_classes = (Pruned,)

    def setUp(self) -> None:
        if reason := _NOT_OURS.get(self._testMethodName):
            self.skipTest(reason)
        super().setUp()
        plain = self.model_tester.get_config
        self.model_tester.get_config = lambda: self.pruned(plain())
        if hasattr(theirs, "Qwen2_5_VLModel"):
            # Where a test builds the base class itself, it gets the one within the pruned model.
            base = patch.object(theirs, "Qwen2_5_VLModel", lambda config: Pruned(config).model)
            base.start()
            self.addCleanup(base.stop)

    def pruned(self, config: Any) -> Any:
        raise NotImplementedError

    def _prepare_for_class(self, inputs: Any, model_class: type, **options: Any) -> Any:
        # Which inputs a class takes (labels) is looked up by its name.
        plain = Qwen2_5_VLForConditionalGeneration if model_class is Pruned else model_class
        return super()._prepare_for_class(inputs, plain, **options)


class TestTrueWidths(_OnPruned):
    """A checkpoint of format `hf`."""

    def pruned(self, config: Any) -> Any:
        text = getattr(config, "text_config", config)
        layers = range(text.num_hidden_layers)
        text.per_layer_config = {str(layer): {"intermediate_size": _WIDTHS[layer % 2]} for layer in layers}
        return config


class TestPadded(_OnPruned):
    """A checkpoint of format `padded`."""

    def pruned(self, config: Any) -> Any:
        getattr(config, "text_config", config).intermediate_size = max(_WIDTHS)
        return config


del _OnPruned  # Lest it be collected itself.
