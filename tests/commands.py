"""The command line as tests run it, and settings that make every stage a matter of seconds."""

import subprocess
import sys
from pathlib import Path

FEW = (
    "--set", "search.targets={first: 0.2, last: 0.5, step: 0.1}",
    "--set", "search.recovery=none",
    "--set", "search.method=paper",
    "--set", "search.confirm=null",
    "--set", "search.evaluations=4",
    "--set", "search.simulations=6",
    "--set", "search.roots=[flap, sensitivity]",
    "--set", "search.sensitivity_levels=1",
    "--set", "train.epochs=3",
    "--set", "compare.targets=[0.5]",
    "--set", "compare.recoveries=[]",
)  # fmt: skip


def lop_command(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end."""
    command = [sys.executable, "-m", "lop", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600)
