"""The checkpoints of jobs as adapters that requests can name: `ftjob-…:ckpt-12`."""

from pathlib import Path

from loradeck.errors import AdapterError, UnknownAdapterError
from loradeck.live.job_folder import JobFolder
from loradeck.live.records import CHECKPOINT
from loradeck.stored import Stored, read_stored


class CheckpointModels:
    """An engine's source of adapters."""

    def __init__(self, folder: Path) -> None:
        """`folder` is that of the jobs' folders."""
        self._folder = folder

    def has(self, spec: str) -> bool:
        """Return whether a name is that of a checkpoint."""
        return CHECKPOINT.fullmatch(spec) is not None

    def find(self, spec: str) -> Stored:
        """Return the checkpoint of a name.

        Raises:
            UnknownAdapterError: there is none.
            AdapterError: it is unusable.
        """
        match = CHECKPOINT.fullmatch(spec)
        path = match and JobFolder(self._folder / match[1]).models / match[2]
        try:
            if path and path.is_dir():
                return read_stored(spec, 0, path, None)
        except AdapterError:
            if path and path.is_dir():  # else it has just been replaced by newer ones
                raise
        raise UnknownAdapterError(f"there is no checkpoint {spec[:128]!r}", hint="A job keeps its last three.")
