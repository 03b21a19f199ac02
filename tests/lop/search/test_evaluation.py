"""Evaluations as records, those of earlier versions included."""

import json
import zlib
from pathlib import Path

import pytest

from lop.search.evaluation import Evaluation
from lop.search.ledger import Ledger
from lop.search.racing import Candidate, Opponent
from lop.space.allocation import Allocation


@pytest.mark.parametrize("name", ["opponent", "rival"])
def test_an_opponent_is_read_by_its_name_and_by_that_of_earlier_records(name: str, tmp_path: Path) -> None:
    raced = {"accuracy": 0.5, "log_probability": -1.0, "hits": "AA==", name: [4, 3], "scored": 3}
    texts = [json.dumps(line, separators=(",", ":")) for line in ({"model": "x"}, {"widths": [3, 4], **raced})]
    segment = "".join(f"{zlib.crc32(text.encode()):08x} {text}\n" for text in texts)
    (tmp_path / "000000000-000000000-00000000.jsonl").write_text(segment)
    with Ledger(tmp_path, {"model": "x"}) as ledger:
        found = ledger.get(Candidate(Allocation((3, 4)), Opponent(Allocation((4, 3)), "AA==")))
    assert found == Evaluation(accuracy=0.5, log_probability=-1.0, hits="AA==", opponent=(4, 3), scored=3)
    assert Evaluation.from_dict(found.as_dict()) == found
