"""What a job reads: its files and the adapter that it goes on from, checked before there is a job."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from loradeck.errors import ConfigError, StorageError
from loradeck.live.adapter_name import is_base
from loradeck.live.job_folder import JobFolder
from loradeck.live.job_recipe import check_settings, sample_count
from loradeck.live.records import FINE_TUNE, TRAINING, VALIDATION, FileRecord, JobRequest
from loradeck.live.uploads import Uploads
from loradeck.serve.request_engine import RequestEngine
from loradeck.stored import Stored
from loradeck.train.inputs import read_parent
from loradeck.train.recipe import JobRecipe


@dataclass(frozen=True, slots=True)
class JobInputs:
    """The files and the adapter of a request that is valid as far as can be told without reading the files."""

    files: Mapping[str, FileRecord]
    """By `training_file` and `validation_file`."""
    parent: Stored | None
    """The adapter that the job goes on from."""
    recipe: JobRecipe

    @classmethod
    def of(cls, request: JobRequest, engine: RequestEngine[Any, Any], uploads: Uploads) -> Self:
        """Find what a request names, and check its settings.

        Raises:
            ConfigError: invalid settings, or a file for another purpose.
            UnknownFileError: the owner has no such file.
            UnknownAdapterError, AdapterError: the model is neither the base nor an adapter to go on from.
        """
        files = {
            kind: uploads.get(id, request.owner)
            for kind, id in ((TRAINING, request.training_file), (VALIDATION, request.validation_file))
            if id is not None
        }
        for kind, file in files.items():
            if file.purpose != FINE_TUNE:
                raise ConfigError(f"{kind} is for the purpose {file.purpose!r}", hint=f"Upload it for {FINE_TUNE!r}.")
        task = engine.base.task
        if request.method == "dpo" and task != "generate":
            raise ConfigError(f"the method dpo is for bases that generate, not for the task {task}")
        if sample_count(request) and task != "generate":
            raise ConfigError(f"samples are answers of bases that generate, not of the task {task}")
        parent = None if is_base(request.model, engine.base) else engine.adapter_cache.find(request.model)
        recipe = check_settings(request, None if parent is None else parent.path)
        if parent is not None:
            read_parent(recipe)
            engine.adapter_cache.bank.check(parent.path)
        return cls(files, parent, recipe)

    def take(self, folder: JobFolder, uploads: Uploads) -> None:
        """Keep the files and the adapter in a job's folder.

        Raises:
            UnknownFileError: the content of a file is gone.
            StorageError: the disk cannot take them.
        """
        try:
            for kind, file in self.files.items():
                folder.take_file(kind, uploads.path(file.id), file.filename)
            if self.parent is not None:
                folder.take_parent(self.parent)
        except OSError as error:
            raise StorageError(f"the job's files cannot be kept: {error.strerror}") from error
