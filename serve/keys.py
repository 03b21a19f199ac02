"""API keys: who may ask."""

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from lop.errors import LopError

VARIABLE = "LOP_API_KEYS"
_SHORTEST = 16


class Keys:
    """The configured keys, of which only digests are kept.

    Raises:
        LopError: a key is so short that it could be guessed.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = []
        for number, key in enumerate(keys, start=1):
            if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise LopError(f"API key {number} is not {_SHORTEST} or more ASCII characters without blanks")
            self._digests.append(_digest(key))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, key: str) -> str | None:
        """A short name for the key that may stand in logs, or None if it is not one of the keys.

        Digests are compared, each in constant time and all of them, so the time taken tells nothing of a key.
        """
        given = _digest(key)
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return given.hex()[:8] if any(matches) else None


def load_keys(file: Path | None) -> Keys:
    """The keys of a file (one a line; `#` begins a comment) and of `LOP_API_KEYS` (separated by commas).

    Raises:
        LopError: the file is missing, or a key too short.
    """
    lines = os.environ.get(VARIABLE, "").split(",")
    if file is not None:
        try:
            lines += [line.partition("#")[0] for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError):
            raise LopError(f"keys file {file} cannot be read") from None
    return Keys(key for line in lines if (key := line.strip()))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
