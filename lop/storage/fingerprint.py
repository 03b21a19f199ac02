"""Short hashes that say what an artefact was made from."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lop.errors import LopError

_BLOCK = 64 * 1024
_BLOCKS = 64


def fingerprint(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of `value` as canonical JSON."""
    return _digest([json.dumps(value, sort_keys=True, separators=(",", ":")).encode()])


def fingerprint_file(path: Path) -> str:
    """The first 16 hex digits of the SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def fingerprint_weights(files: Iterable[Path]) -> str:
    """A fingerprint of weight files that takes milliseconds even for hundreds of gigabytes.

    Hashes each file's size and 64 evenly spread blocks of 64 KiB (files up to 4 MiB: all of it). It tells checkpoints
    apart; it is no proof against a flipped byte.
    """
    parts: list[bytes] = []
    for path in files:
        size = path.stat().st_size
        parts.append(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            if size <= _BLOCK * _BLOCKS:
                parts.append(file.read())
                continue
            for block in range(_BLOCKS):
                file.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                parts.append(file.read(_BLOCK))
    return _digest(parts)


def check_fingerprints(artefact: str, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compares what made an artefact with what is at hand.

    Raises:
        LopError: they differ; names the artefact and the first thing that differs.
    """
    for name, value in expected.items():
        if found.get(name) != value:
            raise LopError(
                f"{artefact} was made with another {name} (fingerprint {found.get(name)}, here {value}): "
                f"use the {name} it was made with, or another --run folder"
            )


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
