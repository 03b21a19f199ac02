"""The cells of long measurements: small files under `results/`, each with the fingerprint of what it was made from."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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


def run(name: str, about: str, summary: Callable[[], dict[str, Any]], check: Callable[[int], tuple[int, int]]) -> None:
    """The command of a benchmark that has no options but `--check`; its last line is JSON.

    Args:
        summary: makes what is missing, prints it, and returns what the last line says.
        check: makes so many cells again; returns how many, and how many agree.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--check", type=int, default=0, metavar="N", help="make N cells again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.check:
        checked, agree = check(options.check)
        print(json.dumps({"benchmark": name, "checked": checked, "agree": agree}))
        return
    print(json.dumps({"benchmark": name, **summary()}))
