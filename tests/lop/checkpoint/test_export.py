"""The stream that writes checkpoints: what is in the files, where they go, and what faults leave behind."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem, SubTreeFileSystem
from safetensors.torch import load_file, save_file

import lop.checkpoint.writing
from lop.checkpoint.export import export, verify
from lop.checkpoint.formats import Format
from lop.checkpoint.inspection import inspect
from lop.errors import CancelledError, LopError
from lop.model.find import assets
from lop.model.tensors import model_size
from lop.space.allocation import Allocation, Space, project
from lop.storage.headers import read_header, read_tensors
from lop.storage.location import Location

MODEL = assets() / "model"
SIZE = model_size(read_tensors(MODEL))
SPACE = Space(SIZE.layers, SIZE.neurons, 8, 0.95)
ORDER = np.argsort(np.random.default_rng(3).random((SPACE.layers, SPACE.neurons)), axis=1)
UNEVEN = project(np.linspace(0.1, 0.8, SPACE.layers), SPACE, SPACE.budget(0.45))


def small_checkpoint(folder: Path, layers: int, hidden: int, neurons: int, dtype: torch.dtype, shards: int) -> None:
    """A checkpoint with the tensors that matter, of any shape and type, in so many files."""
    torch.manual_seed(layers)
    tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": torch.randn(17, hidden)}
    tensors["visual.blocks.0.mlp.down_proj.weight"] = torch.randn(hidden, neurons)
    tensors["model.norm.weight"] = torch.zeros(0)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.mlp.gate_proj.weight"] = torch.randn(neurons, hidden).to(dtype)
        tensors[f"{prefix}.mlp.up_proj.weight"] = torch.randn(neurons, hidden).to(dtype)
        tensors[f"{prefix}.mlp.down_proj.weight"] = torch.randn(hidden, neurons).to(dtype)
        tensors[f"{prefix}.self_attn.q_proj.bias"] = torch.randn(hidden).to(dtype)
    folder.mkdir()
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": neurons}
    config = {"model_type": "qwen2_5_vl", "vision_config": {"depth": 1}, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(1, 3),
    hidden=st.integers(1, 9),
    neurons=st.integers(1, 12),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    shards=st.integers(1, 3),
    limit=st.sampled_from([64, 300, 10**9]),
    chunk=st.sampled_from([16, 128, 2**20]),
    kind=st.sampled_from(["hf", "padded"]),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_what_indexing_gives(
    layers: int, hidden: int, neurons: int, dtype: torch.dtype, shards: int, limit: int, chunk: int,
    kind: Format, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((layers, neurons)), axis=1)
    widths = tuple(int(width) for width in rng.integers(1, neurons + 1, layers))
    widest = max(widths) if kind == "padded" else 0
    with TemporaryDirectory() as parent, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lop.checkpoint.writing, "SHARD_BYTES", limit)
        # A chunk holds at least one row, so it grows with the rows.
        patch.setattr(lop.checkpoint.shards, "CHUNK", max(chunk, 8 * max(hidden, neurons)))
        source, out = Path(parent) / "dense", Path(parent) / "pruned"
        small_checkpoint(source, layers, hidden, neurons, dtype, shards)
        export(source, out, Allocation(widths), order, about={}, format=kind)
        dense, pruned = all_tensors(source), all_tensors(out)
        assert pruned.keys() == dense.keys()
        for name, tensor in dense.items():
            if ".layers." in name and ".mlp." in name:
                layer = int(name.split(".")[2])
                kept = order[layer, : widths[layer]]
                missing = max(widest - widths[layer], 0)
                if "down" in name:
                    tensor = torch.nn.functional.pad(tensor[:, kept], (0, missing))
                else:
                    tensor = torch.nn.functional.pad(tensor[kept], (0, 0, 0, missing))
            assert torch.equal(pruned[name], tensor), name
            assert pruned[name].dtype == dense[name].dtype
        verify(out)
        files = {info.file for info in read_tensors(out).values()}
        assert files == set(out.glob("*.safetensors"))
        for info in read_tensors(out).values():
            assert info.offset % info.item_bytes == 0


@pytest.mark.parametrize("kind", ["hf", "padded"])
def test_whatever_recovery_has_changed_is_what_is_written(tmp_path: Path, kind: Format) -> None:
    small_checkpoint(tmp_path / "dense", 2, 5, 7, torch.bfloat16, 2)
    order = np.stack([np.random.default_rng(layer).permutation(7) for layer in range(2)])
    widths = (3, 6)
    changed = {
        "model.embed_tokens.weight": torch.randn(17, 5),
        "model.layers.0.mlp.gate_proj.weight": torch.randn(3, 5).bfloat16(),
        "model.layers.1.mlp.up_proj.weight": torch.randn(6, 5),
        "model.layers.1.mlp.down_proj.weight": torch.randn(5, 6).bfloat16(),
        "model.layers.1.self_attn.q_proj.bias": torch.randn(5),
        **({"model.layers.0.mlp.down_proj.bias": torch.randn(5)} if kind == "hf" else {}),
    }
    save_file(changed, tmp_path / "recovered.safetensors")
    recovered = read_header(tmp_path / "recovered.safetensors")
    for out, extra in (("plain", {}), ("made", recovered)):
        export(tmp_path / "dense", tmp_path / out, Allocation(widths), order, about={}, format=kind, recovered=extra)
    plain, made = all_tensors(tmp_path / "plain"), all_tensors(tmp_path / "made")
    assert made.keys() == plain.keys() | changed.keys()
    for name, tensor in made.items():
        expected = plain.get(name, tensor).clone()
        if name in changed:
            expected = expected.to(tensor.dtype)
            expected[tuple(slice(size) for size in changed[name].shape)] = changed[name]
        assert torch.equal(tensor, expected), name
    narrower = Allocation((2, 6))
    with pytest.raises(LopError, match=r"recovered tensor model\.layers\.0\.mlp\.gate_proj\.weight is \[3, 5\]"):
        export(tmp_path / "dense", tmp_path / "other", narrower, order, about={}, format=kind, recovered=recovered)
    assert not (tmp_path / "other").exists()


def test_progress_counts_every_byte_and_a_cancelled_export_leaves_nothing(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    export(MODEL, tmp_path / "a", UNEVEN, ORDER, about={}, progress=lambda done, total: seen.append((done, total)))
    written = sum(info.bytes for info in read_tensors(tmp_path / "a").values())
    assert seen[0] == (0, written)
    assert seen[-1] == (written, written)
    assert seen == sorted(seen)
    with pytest.raises(CancelledError):
        export(MODEL, tmp_path / "b", UNEVEN, ORDER, about={}, cancelled=lambda: True)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def memory() -> FileSystem:
    """An object store: files, and no folder that could be renamed."""
    return PyFileSystem(FSSpecHandler(MemoryFileSystem(skip_instance_cache=True)))


@pytest.mark.parametrize("remote", [memory, lambda: SubTreeFileSystem("/", LocalFileSystem())], ids=["store", "disk"])
def test_other_file_systems_get_the_same_files(remote: Callable[[], FileSystem], tmp_path: Path) -> None:
    filesystem, place = remote(), f"{tmp_path}/there/pruned"
    export(MODEL, tmp_path / "here", UNEVEN, ORDER, about={})
    export(MODEL, Location(filesystem, place, "there"), UNEVEN, ORDER, about={})
    for file in (tmp_path / "here").iterdir():
        with filesystem.open_input_stream(f"{place}/{file.name}") as stream:
            assert stream.read() == file.read_bytes()
    with pytest.raises(LopError, match="is there already"):
        export(MODEL, Location(filesystem, place, "there"), UNEVEN, ORDER, about={})


@pytest.mark.parametrize("remote", [memory, lambda: SubTreeFileSystem("/", LocalFileSystem())], ids=["store", "disk"])
def test_a_failure_leaves_nothing_on_other_file_systems(remote: Callable[[], FileSystem], tmp_path: Path) -> None:
    from pyarrow.fs import FileSelector

    filesystem, place = remote(), f"{tmp_path}/there/pruned"
    filesystem.create_dir(f"{tmp_path}/there", recursive=True)
    with pytest.raises(CancelledError):
        export(MODEL, Location(filesystem, place, "there"), UNEVEN, ORDER, about={}, cancelled=lambda: True)
    assert filesystem.get_file_info(FileSelector(f"{tmp_path}/there", recursive=True, allow_not_found=True)) == []


def test_on_a_store_the_config_comes_last(tmp_path: Path) -> None:
    created: list[str] = []

    class Watched(MemoryFileSystem):
        cachable = False

        def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            created.append(Path(path).name)
            return super()._open(path, mode, **options)

    filesystem = PyFileSystem(FSSpecHandler(Watched()))
    export(MODEL, Location(filesystem, "/bucket/pruned", "bucket"), UNEVEN, ORDER, about={})
    assert created[-2:] == ["lop.json", "config.json"]


def put_into_hub_cache(cache: Path, name: str, files: Path) -> None:
    """As `huggingface_hub` lays it out: blobs, and a snapshot of links to them."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--someone--{name}"
    snapshot = repository / "snapshots" / commit
    for folder in ("refs", "blobs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(files.iterdir())):
        blob = repository / "blobs" / f"{number:040d}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))


def test_the_hub_cache_is_a_source_in_one_file_or_many(tmp_path: Path) -> None:
    put_into_hub_cache(tmp_path / "hub", "single", MODEL)
    sharded = shutil.copytree(MODEL, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    weight_map = {}
    for index, (name, tensor) in enumerate(load_file(MODEL / "model.safetensors").items()):
        weight_map[name] = f"model-{index:05d}.safetensors"
        save_file({name: tensor}, sharded / weight_map[name])
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    put_into_hub_cache(tmp_path / "hub", "sharded", sharded)
    script = (
        "import sys; from tests.lop.checkpoint.test_export import *; from lop.model.find import find_model\n"
        "for name in ('single', 'sharded'):\n"
        "    export(find_model(f'someone/{name}'), Path(sys.argv[1]) / name, UNEVEN, ORDER, about={})"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script, tmp_path / "out"], check=True, env=environment)
    export(MODEL, tmp_path / "direct", UNEVEN, ORDER, about={})
    direct = all_tensors(tmp_path / "direct")
    for name in ("single", "sharded"):
        verify(tmp_path / "out" / name)
        found = all_tensors(tmp_path / "out" / name)
        assert found.keys() == direct.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in direct.items())
        assert {file.name for file in MODEL.iterdir()} - {"README.md"} <= {
            file.name for file in (tmp_path / "out" / name).iterdir()
        }


_EXPORTER = """
import sys
from tests.lop.checkpoint.test_export import *
export(MODEL, Path(sys.argv[1]), UNEVEN, ORDER, about={}, progress=lambda done, total: print(done, flush=True))
print("done", flush=True)
time.sleep(60)
"""


def test_killed_at_any_moment_it_leaves_no_folder_that_looks_finished(tmp_path: Path) -> None:
    steps: list[int] = []
    export(MODEL, tmp_path / "whole", UNEVEN, ORDER, about={}, progress=lambda done, total: steps.append(done))
    rng = random.Random(5)
    for attempt, lines in enumerate([1, rng.randrange(2, len(steps)), len(steps), len(steps) + 1]):
        out = tmp_path / f"pruned-{attempt}"
        process = subprocess.Popen([sys.executable, "-c", _EXPORTER, str(out)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(lines):
            assert process.stdout.readline()
        time.sleep(rng.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (tmp_path / "pruned-3").exists()
    # What is left of the others is hidden, or is whole.
    for path in tmp_path.iterdir():
        assert path.name.startswith(".") or inspect(path).damage == "", path


def test_a_full_disk_stops_an_export_and_leaves_nothing(small_disk: Path) -> None:
    with pytest.raises(OSError, match=r"(?i)space"):
        export(MODEL, small_disk / "pruned", UNEVEN, ORDER, about={}, format="padded")
    assert list(small_disk.iterdir()) == []


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    export(MODEL, tmp_path / "p", UNEVEN, ORDER, about={})
    rng = random.Random(9)
    for file in sorted((tmp_path / "p").iterdir()):
        good = file.read_bytes()
        for _ in range(2):
            data = bytearray(good)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
            if file.name != "lop.json":
                try:
                    damage = inspect(tmp_path / "p").damage
                except LopError as error:
                    damage = str(error)
                assert file.name in damage
        file.write_bytes(good)
    assert inspect(tmp_path / "p").damage == ""


def test_a_source_that_ends_too_early_is_named(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    small_checkpoint(source, 1, 4, 8, torch.float32, 1)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(LopError, match=r"model\.safetensors is damaged"):
        export(source, tmp_path / "p", Allocation((4,)), np.arange(8)[None], about={})
    small_checkpoint(tmp_path / "whole", 1, 4, 8, torch.float32, 1)
    with pytest.raises(LopError, match="each neuron"):
        export(tmp_path / "whole", tmp_path / "p", Allocation((4,)), np.zeros((1, 8), int), about={})
    assert not (tmp_path / "p").exists()


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """An export of 400 MB in a process that may not have 100 MB more than before it began."""
    script = (
        "import resource, sys; from tests.lop.checkpoint.test_export import *;"
        "small_checkpoint(Path(sys.argv[1]), 8, 512, 8192, torch.float32, 2)"
    )
    source = tmp_path / "dense"
    subprocess.run([sys.executable, "-c", script, source], check=True)
    order = np.tile(np.arange(8192)[::-1], (8, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    export(source, tmp_path / "p", Allocation((8000, 100, 4000, 8192, 1, 6000, 6000, 6000)), order, about={})
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert sum(file.stat().st_size for file in (tmp_path / "p").iterdir()) > 2.4e8
    assert grown < 150 * 1024  # KiB: the ring of buffers and one matrix
