"""Exports as files: each job's state lives in storage, and whichever process looks next sees all of it.

    storage/jobs/ID.json         the job, replaced atomically
    storage/checkpoints/ID/      what it made; appears whole
    storage/scratch/ID/          what its export needs until it is done
    storage/progress/ID          step, done and total, while it runs
    storage/used/ID              the clock's reading at the last download: least recently used goes first
    storage/clock                counts what happens; other than the time of day, it is never set back
    storage/locks/ID             held (flock) by the process that exports it, and let go by the kernel when that dies
    storage/locks/store          held for each change of a job's state
    storage/locks/clock          held for each reading of the clock

Nothing is kept in memory, so replicas may die at any moment: a job that is `running` while nobody holds its lock is
taken up again.
"""

import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lop.errors import LopError
from lop.storage.files import read_json, write_json
from serve.job import UNFINISHED, Job, QueueFullError, TooLargeError, WithdrawnError

FOLDERS = ("jobs", "checkpoints", "scratch", "progress", "used", "locks")


class JobStore:
    """All jobs of one storage folder; any number of processes may have one open.

    Args:
        root: the storage folder.
        quota: bytes that checkpoints may take.
        queue: unfinished jobs, beyond which new ones are refused.
        attempts: begun exports of a job before it counts as failed.
    """

    def __init__(self, root: Path, *, quota: int, queue: int, attempts: int) -> None:
        self.root, self._quota, self._queue, self._attempts = root, quota, queue, attempts
        self._known: dict[str, tuple[tuple[int, int], Job]] = {}
        for name in FOLDERS:
            (root / name).mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        """Raises:
        OSError: storage cannot be written.
        """
        with tempfile.TemporaryFile(dir=self.root) as file:
            file.write(b"x")

    def folder(self, job: Job) -> Path:
        """Where the job's checkpoint is, or will be."""
        return self.root / "checkpoints" / job.id

    def get(self, id: str) -> Job | None:
        """The job of an id, if there is one."""
        path = self._job_file(id)
        try:
            stat = path.stat()
            mark = (stat.st_mtime_ns, stat.st_ino)
            known = self._known.get(id)
            if known is None or known[0] != mark:
                known = self._known[id] = (mark, Job.from_dict(read_json(path)))
            return known[1]
        except (FileNotFoundError, LopError):
            if path.exists():
                raise
            self._known.pop(id, None)
            return None

    def all(self) -> list[Job]:
        """All jobs, the newest first."""
        found = (self.get(path.stem) for path in (self.root / "jobs").glob("*.json"))
        return sorted((job for job in found if job), key=lambda job: (job.number, job.created, job.id), reverse=True)

    def waiting(self) -> int:
        """How many jobs are unfinished."""
        return sum(job.state in UNFINISHED for job in self.all())

    def submit(self, job: Job) -> Job:
        """Queues a job, unless it is there: then that one is returned. A failed or evicted one is queued anew.

        Raises:
            QueueFullError: too many are unfinished.
            TooLargeError: it would not fit were it alone.
        """
        with self._changes():
            present = self.get(job.id)
            if present and present.state not in ("failed", "evicted"):
                return present
            if job.reserved > self._quota:
                raise TooLargeError
            if self.waiting() >= self._queue:
                raise QueueFullError
            job = replace(job, number=self._tick())
            self._save(job)
            return job

    def remove(self, id: str) -> bool:
        """Removes a job and its checkpoint; the worker that runs it notices and stops. Returns whether it was there."""
        with self._changes():
            job = self.get(id)
            if job is None:
                return False
            self._job_file(id).unlink()
            self._discard(job)
            return True

    def progress(self, id: str) -> dict[str, Any] | None:
        """How far a job that runs has come: `step`, `done` and `total`."""
        try:
            step, done, total = (self.root / "progress" / id).read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        return {"step": step, "done": int(done), "total": int(total)}

    def touch(self, job: Job) -> None:
        """Marks the checkpoint as used now, where storage has room for the mark."""
        with suppress(OSError):
            self._replace(self.root / "used" / job.id, str(self._tick()))

    def bytes_taken(self) -> int:
        """Of all complete checkpoints, and reserved for those being written."""
        return sum(_taken(job) for job in self.all())

    @contextmanager
    def claim(self) -> Iterator["Claim | None"]:
        """Takes the oldest job that nobody works on, for the length of the block; None if there is none.

        Fails a job that was begun too often, and leaves one that does not fit beside those being written.
        """
        for job in reversed(self.all()):
            if job.state not in UNFINISHED:
                continue
            with self._lock(job.id, wait=False) as held:
                if held and (claim := self._begin(job.id)):
                    try:
                        yield claim
                    finally:
                        shutil.rmtree(claim.scratch, ignore_errors=True)
                    return
        yield None

    def sweep(self) -> None:
        """Removes what processes that died have left: half a checkpoint, one of no job, an export's scratch files."""
        for folder in (*(self.root / "checkpoints").iterdir(), *(self.root / "scratch").iterdir()):
            id = folder.name.lstrip(".").partition(".")[0]
            with self._lock(id, wait=False) as held:
                if held and (folder.parent.name == "scratch" or folder.name != id or self.get(id) is None):
                    shutil.rmtree(folder, ignore_errors=True)

    def _begin(self, id: str) -> "Claim | None":
        with self._changes():
            job = self.get(id)
            if job is None or job.state not in UNFINISHED:
                return None
            if job.attempts >= self._attempts:
                error = f"the export was begun {job.attempts} times, and each time its process died"
                self._save(replace(job, state="failed", finished=time.time(), error=error))
                return None
            if not self._make_room(job):
                return None
            for partial in (self.root / "checkpoints").glob(f".{id}.*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
            claim = Claim(self, replace(job, state="running", started=time.time(), attempts=job.attempts + 1))
            shutil.rmtree(claim.scratch, ignore_errors=True)
            claim.scratch.mkdir()
            self._save(claim.job)
            return claim

    def _make_room(self, job: Job) -> bool:
        """Throws out least recently used checkpoints until the job fits; whether it does."""
        others = [other for other in self.all() if other.id != job.id]
        taken = sum(_taken(other) for other in others)
        complete = [other for other in others if other.state == "complete"]
        excess = taken + job.reserved - self._quota
        if excess > sum(_taken(other) for other in complete):
            return False
        for other in sorted(complete, key=self._last_used):
            if excess <= 0:
                break
            excess -= _taken(other)
            self._save(replace(other, state="evicted", bytes=None, files={}))
            self._discard(other)
        return True

    def _last_used(self, job: Job) -> tuple[int, float]:
        # The time of day tells apart what was last used before there was a clock.
        return _number(self.root / "used" / job.id), job.finished or 0

    def _tick(self) -> int:
        """The clock's next reading, larger than all before it, whichever process took them."""
        with self._lock("clock", wait=True):
            path = self.root / "clock"
            last = _number(path)
            if not last:  # A crash may have taken the file; what was numbered tells what it said last.
                used = map(_number, (self.root / "used").iterdir())
                last = max((*used, *(job.number for job in self.all())), default=0)
            self._replace(path, str(last + 1))
            return last + 1

    def _discard(self, job: Job) -> None:
        folder = self.folder(job)
        with suppress(FileNotFoundError):
            # Out of sight first: half a checkpoint is never seen under its name.
            doomed = folder.with_name(f".{job.id}.{uuid.uuid4().hex}.removed")
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        for name in ("progress", "used"):
            (self.root / name / job.id).unlink(missing_ok=True)

    @staticmethod
    def _replace(path: Path, text: str) -> None:
        """Writes a small file that may be lost with the power, but is never seen half-written."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        temporary.write_text(text)
        os.replace(temporary, path)

    def _save(self, job: Job) -> None:
        write_json(self._job_file(job.id), job.as_dict())

    def _job_file(self, id: str) -> Path:
        return self.root / "jobs" / f"{id}.json"

    @contextmanager
    def _changes(self) -> Iterator[None]:
        with self._lock("store", wait=True):
            yield

    @contextmanager
    def _lock(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Holds a lock file; yields whether it could be had. The kernel lets go of it if this process dies."""
        with (self.root / "locks" / name).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


@dataclass(frozen=True)
class Claim:
    """A job in the hands of one worker."""

    store: JobStore
    job: Job

    @property
    def out(self) -> Path:
        """The checkpoint's folder."""
        return self.store.folder(self.job)

    @property
    def scratch(self) -> Path:
        """A folder of its own, for as long as it runs."""
        return self.store.root / "scratch" / self.job.id

    def report(self, step: str, done: int, total: int) -> None:
        """Writes down the progress.

        Raises:
            WithdrawnError: nobody wants the job any more.
        """
        self._check_wanted()
        self.store._replace(self.store.root / "progress" / self.job.id, f"{step} {done} {total}")

    def complete(self, hashes: Mapping[str, str]) -> Job:
        """Records the checkpoint in `out`, with its files' hashes.

        Raises:
            WithdrawnError: nobody wants the job any more; the checkpoint is removed.
        """
        sizes = {file.name: file.stat().st_size for file in sorted(self.out.iterdir())}
        files = {name: {"bytes": size, "sha256": hashes[name]} for name, size in sizes.items()}
        return self._finish(state="complete", bytes=sum(sizes.values()), files=files, error=None)

    def fail(self, error: str) -> Job:
        """Records why there is no checkpoint.

        Raises:
            WithdrawnError: nobody wants the job any more.
        """
        return self._finish(state="failed", error=error)

    def give_back(self) -> None:
        """Queues the job again as if it had not been begun: the service is being stopped."""
        with suppress(WithdrawnError):
            self._finish(state="queued", attempts=self.job.attempts - 1)

    def _finish(self, **changes: Any) -> Job:
        with self.store._changes():
            try:
                self._check_wanted()
            except WithdrawnError:
                if self.store.get(self.job.id) is None:
                    self.store._discard(self.job)
                raise
            finished = None if changes["state"] == "queued" else time.time()
            job = replace(self.job, finished=finished, **changes)
            if job.state == "complete":
                self.store.touch(job)
            self.store._save(job)
        (self.store.root / "progress" / self.job.id).unlink(missing_ok=True)
        return job

    def _check_wanted(self) -> None:
        current = self.store.get(self.job.id)
        if current is None or current.order != self.job.order:
            raise WithdrawnError


def _number(path: Path) -> int:
    """What a file of one number says; 0 if there is none."""
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0


def _taken(job: Job) -> int:
    if job.state == "complete":
        return job.bytes or 0
    return job.reserved if job.state == "running" else 0
