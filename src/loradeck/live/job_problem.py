"""What a job's owner is told of an error."""

import errno
import sqlite3

from loradeck.errors import ConfigError, DataError, LoradeckError, QuotaError, StorageError, TargetError
from loradeck.live.job_folder import JobFolder
from loradeck.live.records import TRAINING, JobError, file_of

FULL = (errno.ENOSPC, errno.EDQUOT)


def job_error(error: BaseException, folder: JobFolder) -> JobError:
    """Return what a job failed of, without the paths of this machine."""
    if not isinstance(error, LoradeckError):
        text = f"the disk is full: {error}" if is_disk_full(error) else "an unexpected error, which is in the log"
        return JobError("disk_full" if is_disk_full(error) else "server_error", text)
    text = error.text("http").replace(f"{folder.path}/", "")
    if isinstance(error, StorageError) or is_disk_full(error):
        return JobError("disk_full", text)
    if isinstance(error, QuotaError):
        return JobError("quota_exceeded", text, TRAINING)
    if isinstance(error, DataError):
        kind, text = file_of(text)
        return JobError(f"invalid_{kind}", text, kind)
    if isinstance(error, ConfigError | TargetError):
        return JobError("invalid_settings", text)
    return JobError("training_failed", text)


def hide_folder(error: LoradeckError, folder: JobFolder) -> None:
    """Cut the path of a job's folder out of an error."""
    path = f"{folder.path}/"
    error.message, error.hint = error.message.replace(path, ""), error.hint.replace(path, "")
    error.problems = tuple(problem.replace(path, "") for problem in error.problems)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that of a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
