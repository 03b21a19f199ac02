"""GGUF files written as a stream: what stands before the tensors by the `gguf` package, then each tensor's bytes."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lop.checkpoint.edge.keys import add_language, add_tower, check_family, is_left_out, tower_refusal
from lop.checkpoint.edge.pieces import Piece, language_pieces, read_piece, stored_widths, tower_pieces
from lop.checkpoint.edge.tokenizer import add_tokenizer
from lop.checkpoint.edge.types import check_library, ggml
from lop.checkpoint.shards import Cut, write_all
from lop.errors import LopError
from lop.model.families.registry import FAMILIES
from lop.model.shape import read_processor
from lop.storage.destination import NewFolder
from lop.storage.files import read_json
from lop.storage.headers import read_tensors

_TOWER_FILE = "mmproj-f16.gguf"
_ALIGNMENT = 32  # Of tensors in a file, as long as it names no other.


@dataclass(frozen=True)
class Planned:
    """One GGUF file, not yet written: its bytes before the tensors, and these."""

    head: bytes
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Plan:
    """The files of a checkpoint.

    Attributes:
        files: the language model's, and the vision tower's if there is one, by their names.
        stored: [L] neurons that each layer has in the file.
        without_tower: why there is no file for the vision tower; None if there is.
    """

    files: Mapping[str, Planned]
    stored: tuple[int, ...]
    without_tower: str | None

    @property
    def padding_bytes(self) -> int:
        """Bytes of the zeros that fill layers up."""
        return sum(piece.bytes * piece.cut.padding // prod(piece.cut.shape) for piece in self._pieces)

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of them."""
        pieces = self._pieces
        return {
            "files": list(self.files),
            "stored": list(self.stored),
            "parameters": sum(prod(piece.shape) for piece in pieces),
            "bytes": sum(piece.bytes for piece in pieces),
            "types": dict(sorted(Counter(piece.kind for piece in pieces).items())),
            **({"without_tower": self.without_tower} if self.without_tower else {}),
        }

    @property
    def _pieces(self) -> list[Piece]:
        return [piece for file in self.files.values() for piece in file.pieces]


def check_source(source: Path, kind: str) -> None:
    """Looks whether a checkpoint can be written as GGUF at all, before there is work to lose.

    Raises:
        LopError: as `plan`.
    """
    plan(source, [(name, Cut(info, info.shape)) for name, info in read_tensors(source).items()], kind)


def plan(source: Path, cuts: Sequence[tuple[str, Cut]], kind: str, *, name: str = "") -> Plan:
    """What to write.

    Args:
        source: the folder with the config, the tokenizer and the images' settings.
        cuts: the checkpoint's tensors, as they are to be written.
        kind: the type of the language model's weights, a key of `KINDS`.
        name: what the files say the model is called.

    Raises:
        LopError: the `gguf` package is not installed, or llama.cpp cannot compute the model; says why.
    """
    check_library()
    config = read_json(source / "config.json")
    family = FAMILIES[config["model_type"]]
    check_family(source, family)
    text, vision = family.text_config(config), family.vision_config(config)
    cuts = [(tensor, cut) for tensor, cut in cuts if not is_left_out(tensor, config)]
    pieces = language_pieces(cuts, family, kind, text["num_hidden_layers"])
    stored = stored_widths(pieces)
    vocabulary = next(piece.shape[0] for piece in pieces if piece.name.startswith("token_embd."))

    def add_text(writer: Any) -> None:
        add_language(writer, text, stored, kind)
        add_tokenizer(writer, source, vocabulary)

    files = {f"model-{kind}.gguf": Planned(_head("qwen2vl", name, add_text, pieces), tuple(pieces))}
    if (reason := tower_refusal(vision)) is None:
        pieces, images = tower_pieces(cuts, family, vision["depth"]), read_processor(source)
        if "image_mean" not in images:
            raise LopError(f"{source} says nowhere how its images are scaled (preprocessor_config.json)")
        head = _head("clip", name, lambda writer: add_tower(writer, vision, text["hidden_size"], images), pieces)
        files[_TOWER_FILE] = Planned(head, tuple(pieces))
    return Plan(files, tuple(stored), reason)


def write(folder: NewFolder, planned: Plan, on_bytes: Callable[[int], None]) -> dict[str, str]:
    """Writes the files and returns the SHA-256 of each by its name.

    Args:
        on_bytes: told of every few megabytes of tensors; ends the writing by raising.

    Raises:
        LopError: a number does not fit its type.
        OSError: the disk is full or read-only.
    """
    hashes = {}
    for name, file in planned.files.items():
        digest = hashlib.sha256()
        with folder.create(name) as stream:

            def put(data: bytes | memoryview, stream: Any = stream, digest: Any = digest) -> None:
                digest.update(data)
                write_all(stream, memoryview(data))

            put(file.head)
            for piece in file.pieces:
                for values in read_piece(piece):
                    put(values.reshape(-1).view(np.uint8).data)
                    on_bytes(values.nbytes)
                put(bytes(-piece.bytes % _ALIGNMENT))
        hashes[name] = digest.hexdigest()
    return hashes


def _head(architecture: str, name: str, add: Callable[[Any], None], pieces: Sequence[Piece]) -> bytes:
    """What a file holds before its tensors: the keys, and where each tensor is."""
    from gguf import GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape

    writer = GGUFWriter(None, architecture)
    if name:
        writer.add_name(name)
    add(writer)
    for piece in pieces:
        shape = quant_shape_to_byte_shape(piece.shape, ggml(piece.kind))
        writer.add_tensor_info(piece.name, shape, np.dtype(np.uint8), piece.bytes, ggml(piece.kind))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "head"
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = file.read_bytes()
    return head + bytes(-len(head) % _ALIGNMENT)
