"""A pruned model learns from its dense one: what comes of it, what an interruption changes, and what is refused."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lop
from lop.checkpoint.export import verify
from lop.checkpoint.inspection import print_inspection
from lop.cli import main
from lop.distil.student import Student
from lop.distil.training import Training
from lop.errors import CancelledError, LopError
from lop.model.find import assets, fingerprint_model
from lop.stages.distil import distil_stage
from tests.commands import lop_command
from tests.lop.distil.conftest import QUICK, settings, write
from tests.ray_jobs.waiting import wait_for


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def distilled(checkpoint: Path, out: Path, few: Path, *more: str, **arguments: Any) -> dict[str, Any]:
    """The last of a manifest's records of a quick distillation beside `out`."""
    manifest = distil_stage(settings(few, *more), checkpoint, out, work=out.parent / "work", **arguments)
    record: dict[str, Any] = manifest["distilled"][-1]
    return record


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("hf", ()),
        ("padded", ("distil.weights=ffn", "distil.learning_rate=0.004")),
        ("hf", ("distil.lora_rank=4", "distil.learning_rate=0.01")),
        ("padded", ("distil.lora_rank=4", "distil.learning_rate=0.01", "distil.layers=[3, 11]")),
    ],
)
def test_learning_brings_it_nearer_to_the_dense_model(
    form: str,
    more: tuple[str, ...],
    few: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint: Path = request.getfixturevalue("pruned" if form == "hf" else "padded")
    record = distilled(checkpoint, tmp_path / "out", few, *more)
    assert record["reward_kl"]["end"] < 0.9 * record["reward_kl"]["start"]
    assert record["curve"][0] == [0, record["reward_kl"]["start"]]
    assert min(kl for _, kl in record["curve"]) == record["reward_kl"]["end"]
    manifest = verify(tmp_path / "out")
    assert (manifest["recovery"], manifest["format"], len(manifest["distilled"])) == ("distil", form, 1)
    assert manifest["widths"] == verify(checkpoint)["widths"]
    before, after = tensors(checkpoint), tensors(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in before.items()} == {n: tensor.shape for n, tensor in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("visual" in name or "embed_tokens" in name for name in changed)
    assert ("distil.weights=ffn" not in more) or all(".mlp." in name for name in changed)
    if form == "padded":
        for layer, width in enumerate(manifest["widths"]):
            assert (after[f"model.layers.{layer}.mlp.down_proj.weight"][:, width:] == 0).all()
            assert (after[f"model.layers.{layer}.mlp.gate_proj.weight"][width:] == 0).all()
    assert lop.load(tmp_path / "out").config.model_type == "qwen2_5_vl"
    found = lop.inspect(tmp_path / "out")
    assert not found.damage
    assert found.manifest["recovery"] == "distil"
    print_inspection(found)
    assert f"{record['tokens']:,} tokens, KL to dense" in capsys.readouterr().out
    assert "attention are the dense model's" not in (tmp_path / "out" / "README.md").read_text()
    assert not list((tmp_path / "work").glob("student-*"))  # It is done; what the teacher said stays.


def test_what_was_distilled_can_learn_more_and_the_teacher_is_not_asked_again(
    pruned: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = distilled(pruned, tmp_path / "once", few)
    monkeypatch.setattr("lop.stages.distil._take_notes", None)
    second = distilled(tmp_path / "once", tmp_path / "twice", few)
    assert second["reward_kl"]["start"] == pytest.approx(first["reward_kl"]["end"], rel=1e-4)
    assert second["reward_kl"]["end"] <= second["reward_kl"]["start"]
    assert [record["from"] for record in verify(tmp_path / "twice")["distilled"]] == [first["from"], second["from"]]


def test_it_never_ends_behind_where_it_began(pruned: Path, few: Path, tmp_path: Path) -> None:
    more = ("distil.learning_rate=30", "distil.every=1", "distil.patience=2")
    record = distilled(pruned, tmp_path / "out", few, *more)
    assert record["kept"] == "the start: no step was better"
    assert record["reward_kl"]["start"] == record["reward_kl"]["end"]
    assert record["steps"] == 2
    assert all(kl is None or kl > record["reward_kl"]["start"] for _, kl in record["curve"][1:])
    before, after = tensors(pruned), tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_killed_goes_on_to_the_same_weights(pruned: Path, few: Path, tmp_path: Path) -> None:
    distilled(pruned, tmp_path / "calm" / "out", few)
    given = ["distil", pruned, "--set", f"samples={few}", *(part for each in QUICK for part in ("--set", each))]
    command = [*given, "--out", tmp_path / "out", "--work", tmp_path / "work"]
    process = subprocess.Popen([sys.executable, "-m", "lop", *map(str, command)], stderr=subprocess.DEVNULL)
    wait_for(lambda: bool(list((tmp_path / "work").glob("student-*/state.pt"))), "a state")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    again = lop_command(*command)
    assert again.returncode == 0, again.stderr
    assert "distil: goes on after step" in again.stderr
    assert again.stdout == f"{tmp_path / 'out'}\n"
    calm, killed = tensors(tmp_path / "calm" / "out"), tensors(tmp_path / "out")
    assert all(torch.equal(calm[name], killed[name]) for name in calm)
    assert verify(tmp_path / "calm" / "out") == verify(tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_what_is_cancelled_leaves_nothing_but_its_state(pruned: Path, few: Path, tmp_path: Path) -> None:
    asked = iter(range(100))
    with pytest.raises(CancelledError):
        distilled(pruned, tmp_path / "out", few, cancelled=lambda: next(asked) == 2)
    assert {path.name for path in tmp_path.iterdir()} == {"work"}
    (state,) = tmp_path.glob("work/student-*/state.pt")
    kept = state.read_bytes()
    for damaged in (b"", kept[: len(kept) // 2], b"{}"):
        state.write_bytes(damaged)
        with pytest.raises(LopError, match=r"state\.pt is damaged: remove it"):
            distilled(pruned, tmp_path / "out", few)
    state.write_bytes(kept)
    record = distilled(pruned, tmp_path / "out", few)
    assert record["reward_kl"]["end"] < record["reward_kl"]["start"]


def test_text_and_other_samples_are_learnt_from_too(
    pruned: Path, few: Path, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "words.txt"
    text.write_text("A red circle is here.\n\n" + "A green square. " * 200 + "\n\n\n\nThe end.", encoding="utf-8")
    write(tmp_path / "own" / "calibration.parquet", samples.calibration[1::200])
    read: list[int] = []
    learn = Training._learn
    monkeypatch.setattr(
        Training, "_learn", lambda self, step, taught: (read.extend(step), learn(self, step, taught))[1]
    )
    plain = distilled(pruned, tmp_path / "plain", few, "distil.tokens=3000")
    known = set(read)
    read.clear()
    more = distilled(pruned, tmp_path / "more", few, "distil.tokens=6000", texts=[text], folders=[tmp_path / "own"])
    assert plain["samples"] != more["samples"]
    assert set(read) > known
    assert max(read) == len(known) + 3 + 3 - 1  # 3 samples of the folder, 3 passages of the text.


def test_prune_with_recovery_distil_refits_then_distils(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lop.prune("tiny", "refit", ratio=0.7, recovery="refit", format="padded")
    # The samples are those that the shipped run's statistics are of.
    given = [part for each in (*QUICK, "distil.reward_samples=16") for part in ("--set", each)]
    command = ["prune", "--target", "0.7", "--out", "out", "--recovery", "distil", "--format", "padded", *given]
    assert main(command) == 0
    manifest = verify(tmp_path / "out")
    assert manifest["recovery"] == "distil"
    assert manifest["widths"] == verify(tmp_path / "refit")["widths"]
    (record,) = manifest["distilled"]
    assert record["from"] == fingerprint_model(tmp_path / "refit")
    assert record["reward_kl"]["end"] <= record["reward_kl"]["start"]
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "refit", "out"}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must be refused in one line, with nothing written."""
    place = tmp_path / "empty"
    place.mkdir()
    monkeypatch.chdir(place)

    def run(*arguments: str | Path) -> str:
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n"), err[:5]) == ("", 1, "lop: "), err
        assert not list(place.iterdir())
        return err

    return run


def test_what_cannot_learn_is_refused(pruned: Path, few: Path, tmp_path: Path, refused: Any) -> None:
    out = ("--out", "out")
    assert "is not a checkpoint exported by LOP" in refused("distil", assets() / "model", *out)
    assert "is not a checkpoint exported by LOP" in refused("distil", "nowhere", *out)
    assert "is there already" in refused("distil", pruned, "--out", few)
    assert "--text" in refused("distil", pruned, *out, "--text", "nowhere.txt")
    assert "samples folder" in refused("distil", pruned, *out, "--samples", "nowhere")
    assert "learning_rate" in refused("distil", pruned, *out, "--set", "distil.learning_rate=-1")
    assert "top_k" in refused("distil", pruned, *out, "--set", "distil.top_k=0")
    assert "search.recovery" in refused("search", "--set", "search.recovery=distil")
    assert "compare.recoveries" in refused("compare", "--set", "compare.recoveries=[distil]")

    moved = Path(shutil.copytree(pruned, tmp_path / "moved"))
    manifest = json.loads((moved / "lop.json").read_text())
    (moved / "lop.json").write_text(json.dumps({**manifest, "source": "/gone/model"}))
    assert "/gone/model" in (told := refused("distil", moved, *out))
    assert "--model names it" in told
    other = Path(shutil.copytree(assets() / "model", tmp_path / "other"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert "was pruned from another model" in refused("distil", pruned, *out, "--model", other)
    damaged = Path(shutil.copytree(pruned, tmp_path / "damaged"))
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    assert "SHA-256 differs" in refused("distil", damaged, *out)


def test_reward_samples_are_not_learnt_from(pruned: Path, few: Path, samples: Any, tmp_path: Path) -> None:
    write(tmp_path / "own" / "calibration.parquet", samples.reward[::60])
    with pytest.raises(LopError, match="is in both the calibration and the reward samples"):
        distilled(pruned, tmp_path / "out", few, folders=[tmp_path / "own"])


def test_a_layer_that_is_not_there_is_named(pruned: Path, few: Path, tmp_path: Path) -> None:
    with pytest.raises(LopError, match="there is no layer 12"):
        distilled(pruned, tmp_path / "out", few, "distil.layers=[12]")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "has no text"),
        (b" \n\n \n", "has no text"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a <|im_start|> b", "is markup"),
    ],
)
def test_text_that_is_none_is_refused(content: bytes, expected: str, pruned: Path, few: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(LopError, match=expected):
        distilled(pruned, tmp_path / "out", few, texts=[tmp_path / "text"])
    assert {path.name for path in tmp_path.iterdir()} == {"text"}


def test_without_peft_adapters_are_refused_and_full_weights_learn(
    pruned: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(Student, "__init__", None)  # It is told before anything is loaded.
    with pytest.raises(LopError, match="pip install peft"):
        distilled(pruned, tmp_path / "out", few, "distil.lora_rank=4")


def test_several_processes_share_each_step(pruned: Path, few: Path, tmp_path: Path) -> None:
    given = ["distil", pruned, "--set", f"samples={few}", "--set", "device=cpu", "--work", tmp_path / "work"]
    given += [part for each in QUICK for part in ("--set", each)]
    alone = lop_command(*given, "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--module",
        "lop",
    ]
    command = [*launch, *given, "--out", tmp_path / "shared"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'shared'}\n"
    one, two = (verify(tmp_path / name)["distilled"][-1] for name in ("alone", "shared"))
    assert one["tokens"] == two["tokens"]
    assert two["reward_kl"]["end"] == pytest.approx(one["reward_kl"]["end"], rel=0.02)
    assert two["reward_kl"]["end"] < two["reward_kl"]["start"]
