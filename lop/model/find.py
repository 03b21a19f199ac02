"""Where a model named by the user is found."""

import re
from importlib.resources import files
from pathlib import Path

from lop.errors import LopError, first_line
from lop.model import smol
from lop.model.sources import MANIFEST, check_config
from lop.storage.files import check_fetched, expanded
from lop.storage.fingerprint import fingerprint_weights
from lop.storage.headers import weight_files
from lop.storage.places import lasting_name

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
        LopError: there is no such model, the hub cannot be reached or has one that LOP does not take, or what `smol` is
            made of is not installed.
    """
    if name == EMBEDDED:
        return assets() / "model"
    if name == smol.NAME:
        return smol.smol_folder(assets(name))
    path = expanded(name)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json", MANIFEST)):
            raise LopError(f"model folder {name} has no config.json: name a folder that holds a checkpoint")
        check_fetched(path)
        return path
    if _is_path(name):
        raise LopError(
            f"model folder {name} is missing: name {_SHIPPED}, a local checkpoint folder, "
            "or a hub id whose first part is no folder here"
        )
    if not _HUB_ID.fullmatch(name):
        raise LopError(f"unknown model {name!r}: name {_SHIPPED}, a local checkpoint folder or a hub id")
    return _download(name)


def settled(name: str) -> str:
    """A model's or samples' name as a config keeps it: a local folder's so that it is found from anywhere."""
    return lasting_name(name) if name not in SHIPPED and expanded(name).is_dir() else name


def find_samples(name: str) -> Path:
    """The folder that holds the three sample files: a shipped set's name or a local folder.

    Raises:
        LopError: there is no such folder.
    """
    path = assets(name) / "samples" if name in SHIPPED else expanded(name)
    if not path.is_dir():
        raise LopError(f"samples folder {name} is missing: name {_SHIPPED} or a folder with Parquet files")
    check_fetched(path)
    return path


def _is_path(name: str) -> bool:
    """Whether a name that is no folder's was meant as one: a hub id has one slash, and before it no folder's name."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and Path(name).parent.exists())


def fingerprint_model(folder: Path) -> str:
    """A fingerprint of a checkpoint's configuration and weights."""
    return fingerprint_weights([folder / "config.json", *weight_files(folder)])


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Gigabytes of weights follow only where the config says that LOP takes them.
        check_config(Path(snapshot_download(name, allow_patterns=["config.json", "adapter_config.json"])))
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except LopError:
        raise
    except Exception as error:
        raise LopError(
            f"model {name!r} is neither a local folder nor to be had from the hub: {first_line(error)}"
        ) from None
