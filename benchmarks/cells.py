"""The cells of long measurements: small files under `results/`, each with the fingerprint of what it was made from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lop.storage.files import read_json, write_json


def cell(path: Path, made_from: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a cell's file holds; made where it is missing or was made from something else."""
    if path.exists() and (found := read_json(path))["made_from"] == made_from:
        return dict(found)
    print(f"{path.stem} …", flush=True)
    found = {"made_from": made_from, **make()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return found
