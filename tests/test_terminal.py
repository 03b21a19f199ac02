"""Output on terminals of any encoding, into pipes that close, and into nothing at all."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lop.cli import main
from lop.model.find import assets

POSIX = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # Python's own UTF-8 is off, too.
ASCII = {"PYTHONIOENCODING": "ascii"}
COMMANDS = (
    ("predict", "--target", "0.5"),
    ("inspect", "tiny"),
    ("ledger", "{run}"),
    ("watch", "{run}", "--once"),
)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "lop", *map(str, arguments)]


def shell(line: str, **extra: str) -> subprocess.CompletedProcess[bytes]:
    program = f"{sys.executable} -m lop"
    environment = {**os.environ, **extra}
    return subprocess.run(
        ["bash", "-c", line.replace("lop ", f"{program} ")], capture_output=True, env=environment, timeout=120
    )


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which a search of two evaluations has been made."""
    run = tmp_path_factory.mktemp("searched")
    (run / "statistics.safetensors").write_bytes((assets() / "run" / "statistics.safetensors").read_bytes())
    few = ("search.targets={first: 0.3, last: 0.3, step: 0.1}", "search.evaluations=2", "search.roots=[flap]")
    options = [option for setting in few for option in ("--set", setting)]
    assert main(["search", "--run", str(run), "--workers", "0", *options]) == 0
    return run


@pytest.mark.parametrize("environment", [POSIX, ASCII], ids=["posix locale", "ascii streams"])
@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_bars_are_drawn_in_plain_characters_where_there_are_no_others(
    arguments: tuple[str, ...], environment: dict[str, str], searched: Path
) -> None:
    filled = [argument.format(run=searched) for argument in arguments]
    done = subprocess.run(command(*filled), capture_output=True, env={**os.environ, **environment}, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"#" in done.stdout
    done.stdout.decode("ascii")


def test_files_are_utf8_whatever_the_locale(searched: Path, tmp_path: Path) -> None:
    # A source whose files hold more than ASCII, as published tokenizers and cards do.
    done = shell(f"lop prune --target 0.5 --recovery none --out {tmp_path}/p && lop inspect {tmp_path}/p", **POSIX)
    assert done.returncode == 0, done.stderr
    assert b"as they were written" in done.stdout
    config = tmp_path / "mine.yaml"
    config.write_text((searched / "config.yaml").read_text() + "# Größe\n", encoding="utf-8")
    assert shell(f"lop predict --target 0.5 --config {config}", **POSIX).returncode == 0


def test_a_path_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    # pyarrow's file systems cannot open one.
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    prune = [*map(os.fsencode, command("prune", "--target", "0.5", "--recovery", "none", "--out")), folder]
    done = subprocess.run(prune, capture_output=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"is not UTF-8" in done.stderr
    assert not list(tmp_path.iterdir())


def without_reader(*streams: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Runs a command whose output nobody reads any more: the pipe's other end is closed before it starts."""
    reader, writer = os.pipe()
    os.close(reader)
    pipes = {name: writer if name in streams else subprocess.PIPE for name in ("stdout", "stderr")}
    try:
        return subprocess.run(command(*arguments), timeout=120, **pipes)  # type: ignore[call-overload]
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    ("arguments", "code"), [*((arguments, 141) for arguments in COMMANDS), (("predict", "--help"), 0)]
)
def test_a_reader_that_leaves_is_no_reason_to_complain(arguments: tuple[str, ...], code: int, searched: Path) -> None:
    done = without_reader("stdout", arguments=[argument.format(run=searched) for argument in arguments])
    assert (done.returncode, done.stderr) == (code, b"")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("predict", "--target", "2"), 2),
        (("nonsense",), 2),
        # Its bar meets the closed pipe: the work is not done.
        (("prune", "--target", "0.5", "--recovery", "none", "--out", "{folder}/p"), 141),
    ],
)
def test_a_reader_of_the_messages_may_leave_too(arguments: tuple[str, ...], code: int, tmp_path: Path) -> None:
    filled = [argument.format(folder=tmp_path) for argument in arguments]
    assert without_reader("stdout", "stderr", arguments=filled).returncode == code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed: str) -> None:
    assert shell(f"lop predict --target 0.5 {closed}").returncode == 0
    assert shell(f"lop predict --target 2 {closed}").returncode == 2


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    done = shell("lop predict --target 0.5 >/dev/full")
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"No space left" in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, lop.cli; lop.cli.build_parser();"
        "print([name for name in ('torch', 'transformers', 'ray', 'matplotlib', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"


def test_a_prediction_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    # Each takes longer to import than everything else together.
    code = (
        "import json, sys; from lop.cli import main; code = main(['predict', '--target', '0.3', '--json']);"
        "heavy = [name for name in ('torch', 'transformers', 'ray', 'matplotlib') if name in sys.modules];"
        "print(json.dumps([code, heavy]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    answer, found = map(json.loads, done.stdout.splitlines())
    assert answer["widths"]
    assert found == [0, []]
