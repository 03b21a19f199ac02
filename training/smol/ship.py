"""Puts trained eyes where they ship, and writes down what the checkpoint made with them must hash to.

python -m training.smol.ship EYES
"""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from lop.model.find import assets
from lop.model.smol import NAME, WEIGHTS, find_source, sha256, write_checkpoint
from lop.storage.files import atomic_file, write_json


def main() -> None:
    """Copies the eyes and writes `checksums.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("eyes", type=Path, help="what `training.smol.train` wrote")
    options = parser.parse_args()
    folder, source = assets(NAME), find_source()
    with atomic_file(folder / "eyes.safetensors") as temporary:
        shutil.copyfile(options.eyes, temporary)
    with TemporaryDirectory() as name:
        write_checkpoint(source, folder, Path(name))
        write_json(folder / "checksums.json", {source.name: sha256(source), WEIGHTS: sha256(Path(name) / WEIGHTS)})


if __name__ == "__main__":
    main()
