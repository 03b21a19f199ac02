"""Prints pip's constraints to the oldest version that pyproject.toml allows of what LOP and its tests need."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for dependency in (*project["dependencies"], *project["optional-dependencies"]["test"]):
    print(re.sub(r"\[.*\]", "", dependency).replace(">=", "=="))
