"""What LOP answered before: a search, predictions, files and a comparison, against the record in `golden.json`.

`python -m tests.test_golden` writes the record anew; do so only where an answer is meant to change.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.commands import FEW, lop_command

RECORD = Path(__file__).with_name("golden.json")
TARGETS = (0.05, 0.3, 0.42, 0.7)
FORMATS = ("hf", "padded")


def searched(run: Path) -> list[dict[str, Any]]:
    """By target the best widths, and every evaluation in the order of its commitment."""
    return [
        {
            "target": found["target"],
            "best": found["best"]["widths"],
            "widths": [entry["widths"] for entry in found["evaluations"]],
            "log_probabilities": [entry["log_probability"] for entry in found["evaluations"]],
            "accuracies": [entry["accuracy"] for entry in found["evaluations"]],
        }
        for found in json.loads((run / "search.json").read_text())["targets"]
    ]


def compared(run: Path) -> list[dict[str, Any]]:
    """By method and form the right answers of the demo's comparison."""
    rows = json.loads((run / "results.json").read_text())["rows"]
    return [{name: row[name] for name in ("method", "target", "form", "correct", "total")} for row in rows]


def predicted() -> dict[str, list[int]]:
    """The widths of the predictor that ships."""
    answers = {}
    for target in TARGETS:
        done = lop_command("predict", "--target", str(target), "--json")
        answers[str(target)] = json.loads(done.stdout)["widths"]
    return answers


def exported(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights and config of a checkpoint in each format."""
    hashes = {}
    for format in FORMATS:
        out = folder / format
        done = lop_command("prune", "--target", "0.5", "--recovery", "none", "--format", format, "--out", out)
        assert done.returncode == 0, done.stderr
        for name in ("model.safetensors", "config.json"):
            hashes[f"{format}/{name}"] = hashlib.sha256((out / name).read_bytes()).hexdigest()
    return hashes


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(RECORD.read_text())
    return record


def test_a_search_asks_for_and_finds_what_it_did(golden: dict[str, Any], finished: Path) -> None:
    for now, before in zip(searched(finished), golden["search"], strict=True):
        for exact in ("target", "best", "widths"):
            assert now[exact] == before[exact]
        for close in ("log_probabilities", "accuracies"):  # Sums differ in their last digits between processors.
            assert now[close] == pytest.approx(before[close], abs=1e-4)


def test_a_comparison_counts_what_it_did(golden: dict[str, Any], finished: Path) -> None:
    now, before = (
        {(r["method"], r["target"], r["form"]): r for r in rows} for rows in (compared(finished), golden["compare"])
    )
    assert now.keys() == before.keys()
    for key, row in now.items():
        assert row["total"] == before[key]["total"]
        assert row["correct"] == pytest.approx(before[key]["correct"], abs=1)


def test_the_predictor_that_ships_answers_what_it_did(golden: dict[str, Any]) -> None:
    assert predicted() == golden["predictions"]


def test_checkpoints_hold_what_they_did(golden: dict[str, Any], tmp_path: Path) -> None:
    assert exported(tmp_path) == golden["files"]


def record(run: Path) -> None:
    """Writes down what `run`, finished by the demo's command with `FEW`, and what ships answer now."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "search": searched(run),
            "compare": compared(run),
            "predictions": predicted(),
            "files": exported(Path(folder)),
        }
    RECORD.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        made = lop_command("demo", "--run", Path(place) / "demo", "--workers", "0", *FEW)
        sys.exit(made.stderr) if made.returncode else record(Path(place) / "demo")
