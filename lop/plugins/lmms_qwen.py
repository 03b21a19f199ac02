"""lmms-eval's own Qwen2.5-VL with true widths: `--model lop_qwen2_5_vl --model_args pretrained=PATH`.

Its `qwen2_5_vl` names transformers' class, which builds all layers alike, so it opens `padded` checkpoints only. Here
LOP's class takes that place; prompts, image sizes and generation stay lmms-eval's.
"""

from typing import Any
from unittest.mock import patch

try:
    import decord  # noqa: F401
except ImportError:
    # Said here, as lmms-eval's own modules would only say that there is no such module.
    raise ImportError("lmms-eval's qwen2_5_vl reads videos with decord: pip install decord") from None

from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL as Chat
from lmms_eval.models.simple import qwen2_5_vl as simple

from lop.model.families.remote_qwen2_5_vl import LopQwen2_5_VLForConditionalGeneration


class _TrueWidths:
    """Mixed into both of lmms-eval's classes, which load the model in one constructor."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        with patch.object(simple, "Qwen2_5_VLForConditionalGeneration", LopQwen2_5_VLForConditionalGeneration):
            super().__init__(*arguments, **settings)


class LopQwen2_5_VL(_TrueWidths, simple.Qwen2_5_VL):
    """The one for tasks that give a prompt and images."""


class LopQwen2_5_VLChat(_TrueWidths, Chat):
    """The one for tasks that give messages."""
