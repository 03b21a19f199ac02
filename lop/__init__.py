"""LOP: one checkpoint of a vision-language model, pruned to any size by a learned allocation (arXiv 2506.12826).

What a person needs: `predict`, `prune`, `convert`, `load`, `inspect`, `evaluations`, `Client`, and the `LopError` that
they raise.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lop.errors import LopError

if TYPE_CHECKING:
    from lop.checkpoint.export import load
    from lop.client import Client
    from lop.search.ledger import evaluations
    from lop.verbs import convert, inspect, predict, prune

__all__ = ["Client", "LopError", "convert", "evaluations", "inspect", "load", "predict", "prune"]
__version__ = "0.1.0"
_HOMES = {
    "Client": "lop.client",
    "convert": "lop.verbs",
    "evaluations": "lop.search.ledger",
    "inspect": "lop.verbs",
    "load": "lop.checkpoint.export",
    "predict": "lop.verbs",
    "prune": "lop.verbs",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing torch and transformers takes seconds that `import lop` need not spend.
    if name not in _HOMES:
        raise AttributeError(f"module 'lop' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
