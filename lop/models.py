"""Where a model named by the user is found."""

import re
from importlib.resources import files
from pathlib import Path

from lop import smol
from lop.errors import LopError, first_line
from lop.fingerprint import fingerprint_weights
from lop.size import weight_files

EMBEDDED = "tiny"
SHIPPED = (EMBEDDED, smol.NAME)
_SHIPPED = " or ".join(map(repr, SHIPPED))
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def assets(name: str = EMBEDDED) -> Path:
    """The folder of what ships with the package for a model: `model`, `samples` and `run`."""
    return Path(str(files("lop"))) / "assets" / name


def find_model(name: str) -> Path:
    """The local folder of a model: a shipped one's name, a local folder, or a hub id (downloaded or from the cache).

    Raises:
        LopError: there is no such model, the hub cannot be reached, or what `smol` is made of is not installed.
    """
    if name == EMBEDDED:
        return assets() / "model"
    if name == smol.NAME:
        return smol.smol_folder(assets(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LopError(f"model folder {name} has no config.json: name a folder that holds a checkpoint")
        return path
    if not _HUB_ID.fullmatch(name) or name.startswith((".", "~")):
        raise LopError(f"unknown model {name!r}: name {_SHIPPED}, a local checkpoint folder or a hub id")
    return _download(name)


def find_samples(name: str) -> Path:
    """The folder that holds the three sample files: a shipped set's name or a local folder.

    Raises:
        LopError: there is no such folder.
    """
    path = assets(name) / "samples" if name in SHIPPED else Path(name).expanduser()
    if not path.is_dir():
        raise LopError(f"samples folder {name} is missing: name {_SHIPPED} or a folder with Parquet files")
    return path


def fingerprint_model(folder: Path) -> str:
    """A fingerprint of a checkpoint's configuration and weights."""
    return fingerprint_weights([folder / "config.json", *weight_files(folder)])


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except Exception as error:
        raise LopError(
            f"model {name!r} is neither a local folder nor to be had from the hub: {first_line(error)}"
        ) from None
