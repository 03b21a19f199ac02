"""transformers' own tests of each family (the model's, common ones, generation), run on the pruned class.

Its wheel brings none of them: TRANSFORMERS_SOURCE names a folder with the source of the version that is installed.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import tests
from lop.model.families import qwen2_5_vl, qwen2_vl
from lop.model.families.family import Family

_SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not _SOURCE:
    pytest.skip("TRANSFORMERS_SOURCE names no source folder of transformers", allow_module_level=True)
# Its tests import each other as parts of a package `tests`, too, and this one has no module that they ask for.
tests.__path__.append(str(Path(_SOURCE) / "tests"))
sys.path.append(_SOURCE)

from tests.models.qwen2_5_vl import test_modeling_qwen2_5_vl  # noqa: E402
from tests.models.qwen2_vl import test_modeling_qwen2_vl  # noqa: E402

_WIDTHS = (24, 11)
_BASE = "builds transformers' base class alone, which has equal layers only"
_NOT_OURS = {
    "test_inherits_generation_mixin": "asks for the bases that the class names itself; it has the mixin by inheritance",
    "test_base_model_prefix_loads_base_weights": _BASE,
    "test_save_load_fast_init_from_base": _BASE,
    "test_save_load_fast_init_to_base": _BASE,
}


def true_widths(config: Any) -> Any:
    """A config of format `hf`."""
    text = getattr(config, "text_config", config)
    layers = range(text.num_hidden_layers)
    text.per_layer_config = {str(layer): {"intermediate_size": _WIDTHS[layer % 2]} for layer in layers}
    return config


def padded(config: Any) -> Any:
    """A config of format `padded`."""
    getattr(config, "text_config", config).intermediate_size = max(_WIDTHS)
    return config


def on_pruned(family: Family, theirs: Any, prune: Callable[[Any], Any]) -> type:
    """The suite, with the pruned class for the model's own."""
    pruned = family.network_class()
    plain = pruned.__bases__[0]
    model_name = family.architecture.replace("ForConditionalGeneration", "Model")
    suite: type = getattr(theirs, f"{model_name}Test")

    class OnPruned(suite):  # type: ignore[misc]
        all_model_classes = (pruned,)

        def setUp(self) -> None:
            if reason := _NOT_OURS.get(self._testMethodName):
                self.skipTest(reason)
            super().setUp()
            get_config = self.model_tester.get_config
            self.model_tester.get_config = lambda: prune(get_config())
            if hasattr(theirs, model_name):
                # Where a test builds the base class itself, it gets the one within the pruned model.
                base = patch.object(theirs, model_name, lambda config: pruned(config).model)
                base.start()
                self.addCleanup(base.stop)

        def _prepare_for_class(self, inputs: Any, model_class: type, **options: Any) -> Any:
            # Which inputs a class takes (labels) is looked up by its name.
            return super()._prepare_for_class(inputs, plain if model_class is pruned else model_class, **options)

    return OnPruned


TestQwen25TrueWidths = on_pruned(qwen2_5_vl.FAMILY, test_modeling_qwen2_5_vl, true_widths)
TestQwen25Padded = on_pruned(qwen2_5_vl.FAMILY, test_modeling_qwen2_5_vl, padded)
TestQwen2TrueWidths = on_pruned(qwen2_vl.FAMILY, test_modeling_qwen2_vl, true_widths)
TestQwen2Padded = on_pruned(qwen2_vl.FAMILY, test_modeling_qwen2_vl, padded)
