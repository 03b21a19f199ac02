"""Storage that speaks S3, on this machine."""

import logging
from collections.abc import Iterator

import pytest
from pyarrow.fs import FileSystem


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket's URI up to the folder, and the rest of it: `{}` stands for the folder. Processes started meanwhile
    have the keys in their environment.
    """
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    uri = f"s3://bucket/{{}}?endpoint_override=http%3A%2F%2F{host}%3A{port}&region=us-east-1"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        filesystem, _ = FileSystem.from_uri(f"{uri.format('')}&allow_bucket_creation=true")
        filesystem.create_dir("bucket")
        yield uri
    server.stop()
