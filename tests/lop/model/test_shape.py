"""What a run's memory depends on, as a checkpoint's configs say."""

import json
import shutil
from pathlib import Path

from transformers import AutoProcessor

from lop.model.find import assets
from lop.model.shape import read_processor, read_shape

MODEL = assets() / "model"


def test_images_are_scaled_as_transformers_scales_them_where_two_files_say_so(tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "model")
    other = {**read_processor(folder), "size": {"shortest_edge": 1024, "longest_edge": 2048}}
    (folder / "preprocessor_config.json").write_text(json.dumps(other))
    _same_as_transformers(folder, 4096, 4096)
    (folder / "processor_config.json").unlink()
    _same_as_transformers(folder, 1024, 2048)


def _same_as_transformers(folder: Path, least: int, most: int) -> None:
    size = AutoProcessor.from_pretrained(folder).image_processor.size
    tower = read_shape(folder, 2).tower
    assert (tower.least, tower.most) == (size["shortest_edge"], size["longest_edge"]) == (least, most)
