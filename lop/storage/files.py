"""Files and folders that appear whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from lop.errors import LopError, first_line

_Value = TypeVar("_Value")
_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to write; it takes `path`'s place when the block ends without an error.

    Raises:
        OSError: the disk is full or read-only; nothing is left behind.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)
            _sync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling folder of `path` to fill; it becomes `path` when the block ends without an error.

    Args:
        replace: takes the place of a folder that is there already.

    Raises:
        OSError: the disk is full or read-only, or `path` is there already and not an empty folder, and is not to be
            replaced; nothing is left behind.
    """
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            for file in temporary.rglob("*"):
                _sync(file)
            if replace and path.exists():
                path.rename(temporary.with_suffix(".old"))
            temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(temporary.with_suffix(".old"), ignore_errors=True)
        _sync(path.parent)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Has errors name `path`, and not its temporary sibling, of which nobody but this module has heard."""
    try:
        yield
    except OSError as error:
        if os.path.abspath(os.fsdecode(error.filename or "")).startswith(f"{path.parent.absolute()}/.{path.name}."):
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns safetensors' own error for a full or read-only disk into the OSError that it is.

    Raises:
        OSError: the file at `path` could not be written.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        LopError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LopError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:  # Not UTF-8, not JSON, or JSON without an end to its brackets.
        raise LopError(f"{path} is damaged: not JSON ({error})") from None


def read_as(path: Path, parse: Callable[[Any], _Value]) -> _Value:
    """What a function makes of a JSON file's content.

    Raises:
        LopError: the file is missing, is not JSON, or does not hold what the function wants.
    """
    data = read_json(path)
    try:
        return parse(data)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise LopError(f"{path} is damaged: it does not hold what it should ({what})") from None


def expanded(name: str | Path) -> Path:
    """A path as a user writes it: `~` is the home folder.

    Raises:
        LopError: it begins with `~` and the name of nobody here.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise LopError(f"{name}: there is no such user here, or no home folder") from None


def check_fetched(folder: Path) -> None:
    """Tells what `git clone` leaves without Git LFS from the files that it stands for.

    Raises:
        LopError: a file of the folder is such a pointer; names it.
    """
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.stat().st_size < _POINTER_BYTES and file.read_bytes().startswith(_POINTER):
            raise LopError(f"{file} is a Git LFS pointer and not the file itself: run `git lfs pull` there first")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
