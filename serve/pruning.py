"""The worker that takes jobs from storage, one after the other, and exports them."""

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lop.checkpoint.export import verify
from lop.errors import LopError
from lop.model.sources import MANIFEST
from lop.run.run import Run
from lop.space.allocation import Allocation
from serve.catalogue import fingerprints_of
from serve.exporting import write_checkpoint
from serve.job import Job, WithdrawnError
from serve.jobs import Claim, JobStore

log = logging.getLogger("ray.serve")
_POLL_SECONDS = 0.2
_REPORT_SECONDS = 0.1
_GRACE_SECONDS = 60


class StoppedError(Exception):
    """The service is being stopped; the job goes back to the queue."""


class Worker:
    """Exports jobs on the thread that calls `run`.

    Args:
        store: where jobs come from.
        runs: the models on offer.
        time_limit: seconds for one export. It is looked at every few megabytes; what hangs is
            told by `is_stuck`.
        on_finish: told each job that ends, and the seconds it took.
    """

    def __init__(
        self,
        store: JobStore,
        runs: Mapping[str, Run],
        *,
        time_limit: float,
        on_finish: Callable[[Job, float], None] = lambda job, seconds: None,
    ) -> None:
        self._store, self._runs, self._time_limit, self._on_finish = store, runs, time_limit, on_finish
        self._stop = threading.Event()
        self._began: float | None = None

    def run(self) -> None:
        """Works until `stop` is called from another thread."""
        self._store.sweep()
        while not self._stop.is_set():
            try:
                with self._store.claim() as claim:
                    if claim:
                        self._export(claim)
            except Exception:  # Storage that cannot be reached now may be later.
                log.exception("taking a job failed")
                claim = None
            if not claim:
                self._stop.wait(_POLL_SECONDS)

    def stop(self) -> None:
        """Ends `run` at the next few megabytes; a job that is being exported goes back to the queue."""
        self._stop.set()

    @property
    def is_stuck(self) -> bool:
        """Whether an export goes on although its time was up a minute ago."""
        began = self._began
        return began is not None and time.monotonic() - began > self._time_limit + _GRACE_SECONDS

    def _export(self, claim: Claim) -> None:
        began = self._began = time.monotonic()
        log.info("export %s: %s, %s neurons, attempt %d", claim.job.id, *_about(claim.job), claim.job.attempts)
        try:
            # The manifest holds the hashes of all files but its own, made while they were written.
            hashes = {**self._write(claim)["sha256"], MANIFEST: _sha256(claim.out / MANIFEST)}
            job = claim.complete(hashes)
        except WithdrawnError:
            log.info("export %s: withdrawn", claim.job.id)
            return
        except StoppedError:
            claim.give_back()
            return
        except (LopError, OSError) as error:
            job = self._fail(claim, " ".join(str(error).split()))
        except Exception as error:
            log.exception("export %s", claim.job.id)
            job = self._fail(claim, f"internal error: {type(error).__name__}")
        finally:
            self._began = None
        seconds = time.monotonic() - began
        log.info("export %s: %s after %.2f s", job.id, job.state, seconds)
        self._on_finish(job, seconds)

    def _write(self, claim: Claim) -> dict[str, Any]:
        """The manifest of the checkpoint, which is in `claim.out` afterwards."""
        job, run = claim.job, self._runs.get(claim.job.asked.model)
        if run is None or fingerprints_of(run) != dict(job.asked.fingerprints):
            raise LopError(f"model {job.asked.model} is no longer offered as it was when this was asked for")
        report = self._reporter(claim)
        if claim.out.exists():
            # A process died between the checkpoint's appearing and its being recorded.
            try:
                return verify(claim.out, progress=partial(report, "check"))
            except LopError:
                shutil.rmtree(claim.out)
        return write_checkpoint(
            run,
            Allocation((*job.allocation["widths"], *(job.allocation.get("groups") or ()))),
            claim.out,
            format=job.asked.format,
            recovery=job.asked.recovery,
            bits=job.asked.bits,
            scratch=claim.scratch,
            on_progress=report,
        )

    def _reporter(self, claim: Claim) -> Callable[[str, int, int], None]:
        began, reported = self._began or time.monotonic(), 0.0

        def report(step: str, done: int, total: int) -> None:
            nonlocal reported
            now = time.monotonic()
            if self._stop.is_set():
                raise StoppedError
            if now - began > self._time_limit:
                raise LopError(f"the export took longer than its limit of {self._time_limit:g} s")
            if now - reported >= _REPORT_SECONDS or done == total:
                claim.report(step, done, total)
                reported = now

        return report

    def _fail(self, claim: Claim, error: str) -> Job:
        try:
            return claim.fail(error)
        except WithdrawnError:
            return claim.job


def _about(job: Job) -> tuple[str, int]:
    return job.asked.model, job.asked.budget


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
