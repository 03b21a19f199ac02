"""LOP: one Qwen2.5-VL checkpoint, pruned to any size by a learned allocation (arXiv 2506.12826)."""

from typing import TYPE_CHECKING, Any

from lop.errors import LopError

if TYPE_CHECKING:
    from lop.checkpoint.export import load
    from lop.client import Client
    from lop.search.ledger import evaluations

__all__ = ["Client", "LopError", "evaluations", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing torch and transformers takes seconds that `lop predict` need not spend.
    if name == "load":
        from lop.checkpoint.export import load

        return load
    if name == "Client":
        from lop.client import Client

        return Client
    if name == "evaluations":
        from lop.search.ledger import evaluations

        return evaluations
    raise AttributeError(f"module 'lop' has no attribute {name!r}")
