"""The command line as a user meets it, on the embedded model and a run of a few evaluations."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lop
from lop.model.find import assets
from lop.model.tensors import model_size
from lop.predictor.predictor import load_predictor
from lop.run.building import Materials, build_scorer
from lop.run.config import load_config
from lop.run.prediction import unsearched
from lop.run.results import read_search
from lop.run.run import Run
from lop.search.ledger import read_ledger
from lop.search.racing import Candidate
from lop.storage.headers import read_tensors
from tests.commands import FEW, lop_command


def refused(*arguments: str | Path) -> str:
    """Runs a command that must fail by one clear line, and returns the line."""
    done = lop_command(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("lop: ")
    return line


def test_the_demo_leaves_what_it_promises(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert {row["method"] for row in results["rows"]} == {
        "dense", "uniform", "magnitude", "wanda", "flap", "lop-search", "lop-predictor"
    }  # fmt: skip
    for row in results["rows"]:
        assert set(row) == {"method", "target", "form", "correct", "total", "accuracy", "low", "high"}
        assert row["low"] <= row["accuracy"] == row["correct"] / row["total"] <= row["high"]
    assert {frozenset(entry) for entry in results["seconds"]} == {
        frozenset({"method", "calibrate", "allocate", "sort", "prune"})
    }
    budgets = {sum(average["widths"]) for average in results["averages"] if average["method"] != "dense"}
    assert len(budgets) == 1
    report = (finished / "report.md").read_text()
    for picture in ("accuracy.png", "allocations.png", "search.png", "trees.png"):
        assert f"]({picture})" in report
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")
    assert "4 evaluated allocations" in report
    lop.load(finished / "checkpoints" / "0.500")


def test_the_predictor_with_the_best_rewards_at_the_searched_targets_is_chosen(finished: Path) -> None:
    run = Run(load_config(finished / "config.yaml"), finished)
    evaluator = build_scorer(Materials.of(run), run.samples.reward)
    targets = [found.target for found in read_search(run)]
    report = json.loads((finished / "predictors.json").read_text())
    rewards = {}
    for entry in report["architectures"]:
        predictor = load_predictor(finished / "predictors" / entry["architecture"])
        found = [evaluator.evaluate(Candidate(predictor.allocate(run.space.budget(target)))) for target in targets]
        rewards[entry["architecture"]] = np.mean([evaluation.log_probability for evaluation in found])
        assert entry["reward"] == pytest.approx(rewards[entry["architecture"]])
    best = max(rewards, key=lambda architecture: rewards[architecture])
    assert report["chosen"] == load_predictor(finished / "predictor").architecture == best


def test_the_demo_again_does_nothing_twice(finished: Path) -> None:
    before = {path: path.read_bytes() for path in (*(finished / "ledger").iterdir(), finished / "results.json")}
    done = lop_command("demo", "--run", finished, "--workers", "0", *FEW)
    assert done.returncode == 0
    assert done.stderr.count("is there already") >= 4
    assert before == {path: path.read_bytes() for path in before}


INTERRUPTED = "lop: interrupted; the same command goes on where it stopped"


def stop(command: Sequence[str | Path], log: Path, is_there: Callable[[], bool], number: int) -> None:
    """Runs a command until something is there, and stops it as a user does: Ctrl-C is for all of a terminal's group."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "lop", *map(str, command)],
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
            # Tests may run in the background of a shell, which has its jobs ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    while not is_there():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    before = log.read_text()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number  # Five seconds, and what a busy machine adds.
    lines = [line.strip() for line in re.split(r"[\r\n]", log.read_text().removeprefix(before)) if line.strip()]
    assert [line for line in lines if not re.search(r"^(\w+: .*(per second|\d+%\|)|\||\d)", line)] == [INTERRUPTED]


def stopped_at_each(command: Sequence[str | Path], run: Path, stops: Sequence[tuple[str, int]]) -> None:
    """Stops the same command at one stage after the other, by what it shows or a record of the search's, and ends it.

    What is left is what an undisturbed one leaves.
    """
    log = run.with_name("log")
    for text, number in stops:
        recorded = _recorded(run)
        stop(command, log, lambda: text in log.read_text() if text else _recorded(run) > recorded, number)  # noqa: B023
    done = lop_command(*command)
    assert done.returncode == 0, done.stderr


def _recorded(run: Path) -> int:
    return len(lop.evaluations(run)) if any((run / "ledger").glob("*.jsonl")) else 0


def results(run: Path) -> list[Any]:
    """What a run's stages found; not how long they took, nor what only measured features bring, nor the ledger."""
    comparison = json.loads((run / "results.json").read_text())
    del comparison["seconds"]
    kept = _json(run / "predictors.json").items()
    predictors = {key: value for key, value in kept if key not in ("fingerprints", "others")}
    return [_json(run / "search.json")["targets"], predictors, comparison["rows"]]


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.timeout(900)  # So many starts take minutes on a busy machine.
def test_a_stage_that_is_stopped_ends_in_a_line_and_goes_on(finished: Path, tmp_path: Path) -> None:
    stops = [
        ("calibrate:  ", signal.SIGINT),
        *(("", signal.SIGINT), ("", signal.SIGTERM)),
        ("train: score", signal.SIGTERM),
        ("compare:  ", signal.SIGINT),
    ]
    run = tmp_path / "run"
    stopped_at_each(("demo", "--run", run, "--workers", "0", *FEW), run, stops)
    assert results(run) == results(finished)
    assert sorted(read_ledger(run / "ledger")) == sorted(read_ledger(finished / "ledger"))


@pytest.mark.timeout(900)  # So many starts take minutes on a busy machine.
def test_a_stage_with_workers_that_is_stopped_ends_in_a_line_and_goes_on(finished: Path, tmp_path: Path) -> None:
    stops = [
        ("", signal.SIGTERM),
        *(("train: fit", signal.SIGINT), ("train: fit", signal.SIGTERM)),
        ("tables:  ", signal.SIGINT),
    ]
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished / "statistics.safetensors", run)
    shutil.copy(finished / "results.json", run)
    tables = ("--set", "tables.limit=1", "--set", "tables.targets=[0.5]", "--set", "tables.rivals=[]")
    command = ("pipeline", "--config", "demo", "--run", run, "--workers", "2", *FEW, *tables)
    stopped_at_each(command, run, stops)
    assert results(run) == results(finished)
    # The pipeline measures features: the general predictor is scored, too.
    made = Run(load_config(run / "config.yaml"), run)
    general = unsearched(made)
    answers = {general.allocate(made.space.budget(ratio)) for ratio in made.config.search.targets.ratios}
    ours, theirs = (sorted(read_ledger(place / "ledger")) for place in (run, finished))
    assert [known for known in ours if known in theirs or known[0] not in answers] == theirs
    assert not list((run / "tune").iterdir())


def test_a_finished_search_is_shown(finished: Path) -> None:
    shown = lop_command("watch", finished).stdout
    assert "28 of 28 evaluations, finished" in shown  # 12 layers alone, and 4 targets of 4.
    assert len(re.findall(r"(?m)^ *(20|30|40|50)% +4/4 +-0\.\d{4}  [▁-█]+", shown)) == 4
    table = lop_command("ledger", finished).stdout.splitlines()
    assert len(table) == 1 + 28
    rows = [json.loads(line) for line in lop_command("ledger", finished, "--json").stdout.splitlines()]
    assert rows == lop.evaluations(finished)
    assert {sum(row["widths"]) for row in rows} == {row["kept"] for row in rows}
    assert "no search has begun" in refused("watch", finished / "checkpoints")
    assert "lop search" in refused("ledger", finished / "checkpoints")
    assert "cannot be opened" in refused("watch", "nonsense://place")


def test_help_lists_the_stages() -> None:
    text = lop_command("--help").stdout
    for stage in ("calibrate", "search", "train", "predict", "prune", "compare", "demo", "ledger", "watch"):
        assert stage in text
        assert lop_command(stage, "--help").returncode == 0


def test_prediction_speaks_json_and_agrees_with_the_checkpoint(finished: Path, tmp_path: Path) -> None:
    done = lop_command("predict", "--run", finished, "--target", "0.3", "--json")
    answer = json.loads(done.stdout)
    assert {"ratios", "widths", "kept_neurons", "parameters", "bytes"} <= set(answer)
    assert sum(answer["widths"]) == answer["kept_neurons"]
    assert lop_command("prune", "--run", finished, "--target", "0.3", "--out", tmp_path / "p").returncode == 0
    tensors = read_tensors(tmp_path / "p")
    assert sum(tensor.parameters for tensor in tensors.values()) == answer["parameters"]
    assert sum(tensor.bytes for tensor in tensors.values()) == answer["bytes"]
    by_bytes = lop_command("predict", "--run", finished, "--bytes", str(answer["bytes"]), "--json")
    assert json.loads(by_bytes.stdout)["widths"] == answer["widths"]
    shown = lop_command("predict", "--run", finished, "--parameters", str(answer["parameters"]))
    assert f"{answer['parameters']:,} parameters" in shown.stdout


def test_inspect_tells_what_a_checkpoint_is_and_finds_a_flipped_byte(tmp_path: Path) -> None:
    out = tmp_path / "p"
    arguments = ("--recovery", "none", "--format", "padded", "--max-width-ratio", "1.1")
    done = lop_command("prune", "--target", "0.4", *arguments, "--out", out)
    assert done.returncode == 0
    found = json.loads(lop_command("inspect", out, "--json").stdout)
    assert found["format"] == "padded"
    assert found["verified"] is True
    assert found["manifest"]["recovery"] == "none"
    assert len(set(found["stored"])) == 1
    assert found["stored"][0] == max(found["widths"])
    kept = sum(found["widths"])
    assert found["ratio"] == pytest.approx(1 - kept / (len(found["widths"]) * found["neurons"]))
    # A multiple of the granularity (8) of at least the mean is always allowed.
    assert max(found["widths"]) <= max(1.1 * kept / len(found["widths"]), kept / len(found["widths"]) + 8)
    assert f"{found['manifest']['padding_bytes']:,} bytes of zeros" in done.stderr
    shown = lop_command("inspect", out).stdout
    assert f"{found['parameters']:,}" in shown
    assert shown.count("layer ") == len(found["widths"])
    assert "as they were written" in shown
    dense = json.loads(lop_command("inspect", assets() / "model", "--json").stdout)
    assert (dense["format"], dense["ratio"], dense["verified"]) == ("dense", 0, None)
    tokenizer = out / "tokenizer.json"
    data = bytearray(tokenizer.read_bytes())
    data[len(data) // 3] ^= 1
    tokenizer.write_bytes(data)
    assert "tokenizer.json is not what was written" in refused("inspect", out)
    assert "config.json" in refused("inspect", tmp_path)


def test_what_a_format_cannot_hold_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = refused("prune", "--target", "0.3", "--format", "padded", "--recovery", "bias", "--out", out)
    assert "no place for a bias" in line
    assert "max_width_ratio" in refused("prune", "--target", "0.3", "--max-width-ratio", "0.5", "--out", out)
    assert "nosuch://" in refused("prune", "--target", "0.3", "--out", "nosuch://bucket/folder")
    assert not out.exists()


def test_bad_targets_are_refused(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for target in ("-0.1", "0.99", "1", "nan", "half"):
        assert target in refused("prune", "--run", finished, f"--target={target}", "--out", out)
    assert "outside" in refused("prune", "--run", finished, "--bytes", "1KiB", "--out", out)
    assert "parameters" in refused("predict", "--run", finished, "--parameters", "5Q")
    assert not out.exists()


def test_bad_names_and_settings_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "'nonsense'" in refused("calibrate", "--model", "nonsense", "--run", run)
    assert "config.json" in refused("calibrate", "--model", tmp_path, "--run", run)
    assert "serch" in refused("search", "--set", "serch.simulations=3", "--run", run)
    assert "'many'" in refused("search", "--set", "search.simulations=many", "--run", run)
    assert "none.yaml" in refused("search", "--config", "none.yaml", "--run", run)
    assert "lop calibrate" in refused("search", "--run", run)
    assert not run.exists()


def test_a_run_of_another_model_is_refused(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(assets() / "model", other)
    text = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**text, "note": "another"}))
    for command in (("search", *FEW), ("train", *FEW), ("compare", *FEW), ("predict", "--target", "0.3")):
        assert "another model" in refused(*command, "--run", finished, "--model", other)


def test_damaged_files_are_refused(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoints"))
    (run / "search.json").unlink()
    (segment, *_) = sorted((run / "ledger").iterdir())
    ledger = bytearray(segment.read_bytes())
    ledger[len(ledger) // 2] ^= 1
    segment.write_bytes(ledger)
    assert "checksum of line" in refused("search", "--run", run, "--workers", "0", *FEW)
    model = tmp_path / "model"
    shutil.copytree(assets() / "model", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "damaged" in refused("calibrate", "--model", model, "--run", tmp_path / "r")
    (run / "statistics.safetensors").write_bytes(b"nothing")
    assert "damaged" in refused("search", "--run", run, *FEW)


def test_a_full_disk_is_refused_and_leaves_nothing(finished: Path, small_disk: Path) -> None:
    assert "space" in refused("prune", "--run", finished, "--target", "0.2", "--out", small_disk / "pruned").lower()
    assert list(small_disk.iterdir()) == []


def test_a_read_only_disk_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fixed"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a read-only disk needs root")
    try:
        assert "ead-only" in refused("prune", "--run", finished, "--target", "0.2", "--out", folder / "pruned")
    finally:
        subprocess.run(["umount", folder], check=True)


def test_what_ships_answers_without_a_run(tmp_path: Path) -> None:
    answer = json.loads(lop_command("predict", "--target", "0.3", "--json", cwd=tmp_path).stdout)
    size = model_size(read_tensors(assets() / "model"))
    assert answer["parameters"] == size.pruned_parameters(answer["kept_neurons"])
    assert lop_command("prune", "--target", "0.3", "--out", tmp_path / "p", cwd=tmp_path).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"p"}
    assert os.listdir(tmp_path / "p")


@pytest.mark.parametrize("settings", [(), ("--config", "tiny")])
def test_what_ships_was_made_with_the_settings_that_ship(tmp_path: Path, settings: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    shutil.copytree(assets() / "run", run)
    for stage in ("search", "train"):
        assert "is there already" in lop_command(stage, "--run", run, *settings).stderr


def test_compare_makes_the_papers_tables(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("checkpoints"))
    few = (
        *FEW,
        "--set", "tables.limit=3",
        "--set", "tables.targets=[0.5]",
        "--set", "tables.baselines=[uniform, flap, owl]",
        "--set", "tables.rivals=[random, sensitivity]",
    )  # fmt: skip
    checkpoint = tmp_path / "plain"
    # The tables score allocations as they are; the demo's own checkpoints have been refitted.
    plain = lop_command("prune", "--run", finished, "--target", "0.5", "--recovery", "none", "--out", checkpoint)
    assert plain.returncode == 0, plain.stderr
    arguments = ("compare", "--config", "demo", "--run", run, "--workers", "0", "--against", checkpoint, *few)
    done = lop_command(*arguments)
    assert done.returncode == 0, done.stderr
    tables = json.loads((run / "tables.json").read_text())
    average = {v["method"]: v for v in tables["values"] if v["column"] == "average" and v["target"] == 0.5}
    assert {"uniform", "flap", "owl", "random", "sensitivity", "lop-search", "lop-predictor"} <= set(average)
    for value in average.values():
        assert value["share"]["low"] <= value["share"]["value"] <= value["share"]["high"]
        assert value["p"] < 0.05 or not value["bold"]
    # The predictor's checkpoint, written out and asked to generate, says what its slices were scored to say.
    by_name = {model["name"]: model for model in tables["models"]}
    assert by_name[str(checkpoint)]["metrics"] == pytest.approx(by_name["LOP 50%"]["metrics"])
    assert by_name[str(checkpoint)]["parameters"] == by_name["LOP 50%"]["parameters"]
    for name in ("table1", "table2", "table3", "figure1", "figure4", "rivals"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "against all baselines" in (run / "tables.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in (*(run / "cells").iterdir(), *(run / "rivals").iterdir())}
    assert lop_command(*arguments).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
