"""What clients send to upload files and to train adapters, in OpenAI's shapes."""

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from msgspec import Meta

from loradeck.api.requests import NonEmptyStr, Unsupported

Auto: TypeAlias = Literal["auto"]
Count: TypeAlias = Annotated[int, Meta(ge=1, le=2**31)]
Factor: TypeAlias = Annotated[float, Meta(gt=0, le=1e6)]
Id: TypeAlias = Annotated[str, Meta(min_length=1, max_length=128)]
PageSize: TypeAlias = Annotated[int, Meta(ge=1, le=1000)]


class UploadRequest(msgspec.Struct, kw_only=True):
    """`POST /v1/files`, a form."""

    file: Annotated[str, Meta(extra_json_schema={"format": "binary"})]
    """A dataset in any form that `loradeck check` reads."""
    purpose: Literal["fine-tune"]


class FilesQuery(msgspec.Struct, kw_only=True):
    """The parameters of `GET /v1/files`."""

    after: Id | None = None
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


class CheckQuery(msgspec.Struct, kw_only=True):
    """The parameters of `GET /v1/files/{id}/check`."""

    max_length: Annotated[int, Meta(ge=2, le=2**31)] = 1024
    """Maximum tokens of a sequence; longer ones are cut at the end. By default as in training."""


class PageQuery(msgspec.Struct, kw_only=True):
    """The parameters of a list whose newest entries come first."""

    after: Id | None = None
    """The last entry of the page before."""
    limit: PageSize = 20


class EventsQuery(PageQuery, kw_only=True):
    """The parameters of `GET /v1/fine_tuning/jobs/{id}/events`."""

    stream: bool = False
    """Send the events as they come, the oldest first, as server-sent events; an addition to OpenAI's API."""


class Hyperparameters(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's words for how an adapter is trained; `auto` and null are the defaults."""

    n_epochs: Auto | Count | None = None
    batch_size: Auto | Count | None = None
    learning_rate_multiplier: Auto | Factor | None = None
    """Of the learning rate that follows from the base's width."""


class DpoHyperparameters(Hyperparameters, kw_only=True, forbid_unknown_fields=True):
    """Those of preference pairs."""

    beta: Auto | Factor | None = None


class SupervisedMethod(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Training on answers."""

    hyperparameters: Hyperparameters | None = None


class DpoMethod(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Training on preference pairs."""

    hyperparameters: DpoHyperparameters | None = None


class Method(msgspec.Struct, kw_only=True):
    """How an adapter is trained."""

    type: Literal["supervised", "dpo"]
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None


class FineTuningJobRequest(msgspec.Struct, kw_only=True):
    """`POST /v1/fine_tuning/jobs`; null means the default."""

    model: NonEmptyStr
    """The base, or an adapter whose training goes on."""
    training_file: Id
    validation_file: Id | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """OpenAI's older place for those of the method `supervised`."""
    suffix: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    """The adapter's name; if it exists, the job publishes its next version."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    metadata: (
        Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]
        | None
    ) = None
    lora: dict[str, Any] | None = None
    """What OpenAI has no word for: keys of an [[adapter]] of a run file, such as r, target_modules, learning_rate."""

    unsupported: ClassVar[Unsupported] = {"integrations": ([],)}
