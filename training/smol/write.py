"""Samples as a Parquet file."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lop.model.samples import Sample
from lop.storage.files import atomic_file

_SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        *((name, pa.string()) for name in ("image_id", "source", "kind", "form", "question")),
        ("options", pa.list_(pa.string())),
        ("answer", pa.string()),
    ]
)


def write(samples: Iterable[Sample], path: Path) -> None:
    """One row a sample; an image asked about more than once is stored once."""
    rows = [{**asdict(sample), "image": sample.image or None} for sample in samples]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", use_dictionary=True, dictionary_pagesize_limit=64 * 2**20)
