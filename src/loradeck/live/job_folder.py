"""The folder of a job: that of its run, with all that the job reads, so that nothing it needs can be taken away.

FOLDER/                          a run's folder (see train.run); once the job ends well, the adapter is in it
FOLDER/training_file/NAME        the files, under the names that their owner gave them
FOLDER/validation_file/NAME
FOLDER/parent/NAME@VERSION/      the adapter that the job goes on from
FOLDER/models/STEP/              checkpoints that requests can name: PEFT folders
"""

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from loradeck.dataset.source import SUFFIXES
from loradeck.disk import new_folder
from loradeck.live.records import TRAINING, VALIDATION
from loradeck.lora.names import valid_name
from loradeck.stored import Stored
from loradeck.train.run import CHECKPOINTS

PARENT, MODELS = "parent", "models"
STEM = 60  # characters of a file's name that are kept; each is up to four bytes of the 255 that a disk takes


class JobFolder:
    """The paths of a job's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models = path / MODELS
        self.checkpoints = path / CHECKPOINTS

    def take_file(self, kind: str, content: Path, filename: str) -> None:
        """Keep a file, as `training_file` or `validation_file`, unless the job has it.

        Raises:
            OSError: it cannot be linked or copied.
        """
        self._take(kind, lambda new: _link(content, new / _plain(filename)))

    def take_parent(self, parent: Stored) -> None:
        """Keep the adapter that the job goes on from, unless the job has one.

        Raises:
            OSError: it cannot be linked or copied.
        """

        def link(new: Path) -> None:
            (new / parent.path.name).mkdir()
            for name, *_ in parent.stamp:
                _link(parent.path / name, new / parent.path.name / name)

        self._take(PARENT, link)

    def taken(self, kind: str) -> Path | None:
        """Return what was kept as `training_file`, `validation_file` or `parent`, None if nothing was."""
        folder = self.path / kind
        return next(folder.iterdir(), None) if folder.is_dir() else None

    def free(self) -> None:
        """Remove what an ended job needs no more; its metrics and its models stay."""
        for path in (*(self.path / kind for kind in (TRAINING, VALIDATION, PARENT)), self.checkpoints):
            shutil.rmtree(path, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a kill left half written."""
        for folder in (self.path, self.models, self.checkpoints):
            with suppress(FileNotFoundError):
                remove(path for path in folder.iterdir() if path.name.startswith("."))

    def _take(self, kind: str, fill: Callable[[Path], None]) -> None:
        if not (self.path / kind).is_dir():
            with new_folder(self.path / kind) as new:
                fill(new)


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders."""
    for path in [*paths]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _plain(filename: str) -> str:
    """Return a name for a file that says what it is, as its owner's did; without a known suffix it is JSON lines."""
    suffix = max((each for each in SUFFIXES if filename.lower().endswith(each)), key=len, default="")
    stem = filename[: len(filename) - len(suffix)]
    return valid_name(stem)[:STEM] + (filename[len(stem) :] or ".jsonl")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
