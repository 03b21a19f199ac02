"""The jobs in storage, without a service."""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.job import Asked, Job
from serve.jobs import JobStore

ROOM = 3
STEPS = st.lists(st.tuples(st.integers(0, 6), st.floats(0, 2e9), st.booleans()), min_size=1, max_size=14)


def asked(number: int) -> Job:
    return Job(Asked("tiny", {}, number, "hf", "none", {"ratio": 0.5}), {}, reserved=10)


@settings(max_examples=25)
@given(STEPS)
def test_the_least_recently_used_goes_whatever_the_time_of_day(steps: list[tuple[int, float, bool]]) -> None:
    with TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        used: list[str] = []
        for number, now, lost in steps:
            patch.setattr("serve.jobs.time", SimpleNamespace(time=lambda now=now: now))
            if lost:
                (Path(root) / "clock").unlink(missing_ok=True)
            store = JobStore(Path(root), quota=10 * ROOM, queue=9, attempts=9)
            job = store.submit(asked(number))
            if job.state == "complete":
                store.touch(job)
            else:
                with store.claim() as claim:
                    assert claim is not None
                    claim.out.mkdir()
                    (claim.out / "model").write_bytes(b"0123456789")
                    job = claim.complete({"model": ""})
            used = [*(id for id in used if id != job.id), job.id][-ROOM:]
            assert {each.id for each in store.all() if each.state == "complete"} == set(used)


def test_jobs_are_taken_in_the_order_asked_for_whatever_the_time_of_day(tmp_path: Path) -> None:
    store = JobStore(tmp_path, quota=1000, queue=9, attempts=9)
    jobs = [store.submit(Job(asked(n).asked, {}, reserved=10, created=1e9 - n)) for n in range(5)]
    assert [job.id for job in store.all()] == [job.id for job in jobs[::-1]]
    for job in jobs:
        with store.claim() as claim:
            assert claim is not None
            assert claim.job.id == job.id
            claim.fail("enough")
