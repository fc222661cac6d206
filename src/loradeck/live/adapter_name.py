"""The name that a job publishes its adapter under. Light to import: a server that does not train imports it too."""

from pathlib import Path

from loradeck.base.load import Base
from loradeck.errors import AdapterNameError
from loradeck.live.records import JobRequest
from loradeck.lora.names import check_name, valid_name


def is_base(model: str, base: Base) -> bool:
    """Whether a model's name is the base's own."""
    return model in (base.name, base.source)


def adapter_name(request: JobRequest, base: Base, id: str) -> str:
    """Return the name that a job publishes its adapter under: as asked, its parent's, or one of its own.

    A name of its own has the job's id in it, so that nobody else can guess it; without an id it is "".

    Raises:
        AdapterNameError: the name that was asked for is invalid, or the base's.
    """
    if request.suffix is not None:
        check_name(request.suffix)
        if is_base(request.suffix, base):
            raise AdapterNameError(f"{request.suffix!r} is the base's name", hint="Give the adapter another one.")
        return request.suffix
    if is_base(request.model, base):
        return f"{valid_name(Path(base.name).name)[:64]}-{id.removeprefix('ftjob-')}" if id else ""
    return valid_name(request.model.partition("@")[0])
