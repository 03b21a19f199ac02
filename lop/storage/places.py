"""Where a process may leave what is to last: a Ray job's working directory is a copy that goes with the job."""

import os
from pathlib import Path

from lop.errors import LopError
from lop.storage.files import expanded

# Set for a submitted job's driver alone; and where Ray unpacks what a job, or a deployed application, brings along.
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_UNPACKED = "working_dir_files"


def in_ray_job() -> bool:
    """Whether this process is a Ray job's, or works in what a job brought along."""
    return _JOB_VARIABLE in os.environ or _UNPACKED in Path.cwd().parts


def check_lasting(what: str, place: str | Path) -> None:
    """Refuses a relative path in a Ray job, before anything is written that would be gone with the job.

    Args:
        what: how the user names it.
        place: a path or a URI.

    Raises:
        LopError: whatever is written there is lost.
    """
    if in_ray_job() and "://" not in str(place) and not expanded(place).is_absolute():
        raise LopError(
            f"{what} {place} is relative, and a Ray job's working directory is gone with the job: "
            "name an absolute path that all machines share, or a URI such as s3://bucket/folder"
        )


def lasting_name(folder: str) -> str:
    """An existing folder's name as a run keeps it: absolute; in a Ray job, what is brought along stays relative to it.

    Either way it is never taken for anything but a folder.
    """
    path = expanded(folder)
    if in_ray_job() and not path.is_absolute():
        return f"./{path}"
    return str(path.absolute())
