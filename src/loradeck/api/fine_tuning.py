"""OpenAI's fine-tuning jobs: adapters that the server trains."""

import re
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import msgspec
from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from loradeck.api.errors import HttpError, error_info, invalid_field
from loradeck.api.model_name import BASE
from loradeck.api.requests import read_body, read_query
from loradeck.api.responses import ErrorResponse, json_response
from loradeck.api.state import ServerState, state_of, training_of
from loradeck.api.streaming import EventStream, SendEvent
from loradeck.api.training_requests import (
    EventsQuery,
    FineTuningJobRequest,
    Hyperparameters,
    Method,
    PageQuery,
)
from loradeck.api.training_responses import FineTuningJob, FineTuningJobCheckpoint, FineTuningJobEvent, Page
from loradeck.errors import AdapterNameError, UnknownFileError
from loradeck.live.adapter_name import adapter_name
from loradeck.live.records import EventRecord, JobRecord, JobRequest

if TYPE_CHECKING:
    from loradeck.api.auth import ApiKey
    from loradeck.live.live_training import LiveTraining

METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)  # how OpenAI's clients write a mapping in a URL
KEYS = {"n_epochs": "epochs", "batch_size": "batch_size", "beta": "dpo_beta"}  # of a run file


async def create_job(request: Request) -> Response:
    """Create a job that trains an adapter; its files are validated while it waits."""
    training, state, key = training_of(request), state_of(request), request.state.key
    body = await read_body(request, FineTuningJobRequest, state.config.max_body_bytes)

    def create() -> JobRecord:
        job = job_request(state, training, key, body)
        with invalid_field("lora"):
            return training.create(job, key.quota)

    return json_response(FineTuningJob.of(await run_sync(create)))


async def list_jobs(request: Request) -> Response:
    """List the key's jobs, the newest first."""
    jobs, query = training_of(request).jobs, read_query(request, PageQuery)
    pairs = {match[1]: value for name, value in request.query_params.items() if (match := METADATA.fullmatch(name))}

    def page() -> Page[FineTuningJob]:
        records, more = jobs.list(request.state.key.name, after=query.after, limit=query.limit, metadata=pairs)
        return Page.of([FineTuningJob.of(record) for record in records], more)

    return json_response(await run_sync(page))


async def get_job(request: Request) -> Response:
    """Describe a job."""
    return json_response(FineTuningJob.of(await run_sync(_job, training_of(request), request)))


async def cancel_job(request: Request) -> Response:
    """Cancel a job that has not ended; nothing is published."""
    return await _change(request, training_of(request).cancel)


async def pause_job(request: Request) -> Response:
    """Pause a job that waits or runs."""
    return await _change(request, training_of(request).pause)


async def resume_job(request: Request) -> Response:
    """Let a paused job go on from where it was."""
    return await _change(request, training_of(request).resume)


async def list_events(request: Request) -> ASGIApp:
    """List what happened to a job, the newest first, or stream it with `stream=true`, the oldest first."""
    training, query = training_of(request), read_query(request, EventsQuery)
    job = await run_sync(_job, training, request)
    if query.stream:
        return _stream(request, training.follow(job.id, request.state.key.name, query.after))

    def page() -> Page[FineTuningJobEvent]:
        records, more = training.jobs.events(job.id, after=query.after, limit=query.limit)
        return Page.of([FineTuningJobEvent.of(record) for record in records], more)

    with invalid_field("after"):
        return json_response(await run_sync(page))


async def list_checkpoints(request: Request) -> Response:
    """List a job's checkpoints, the newest first; each can be asked like a model."""
    training, query = training_of(request), read_query(request, PageQuery)
    job = await run_sync(_job, training, request)

    def page() -> Page[FineTuningJobCheckpoint]:
        records, more = training.jobs.checkpoints(job.id, after=query.after, limit=query.limit)
        return Page.of([FineTuningJobCheckpoint.of(record) for record in records], more)

    with invalid_field("after"):
        return json_response(await run_sync(page))


# ---- from a request to a job


def _job(training: "LiveTraining", request: Request) -> JobRecord:
    return training.jobs.get(request.path_params["id"], request.state.key.name)


async def _change(request: Request, change: Callable[[str, str], JobRecord]) -> Response:
    record = await run_sync(change, request.path_params["id"], request.state.key.name)
    return json_response(FineTuningJob.of(record))


def job_request(state: ServerState, training: "LiveTraining", key: "ApiKey", body: FineTuningJobRequest) -> JobRequest:
    """Return what a body asks for, once the key may have it.

    Raises:
        HttpError: 400, an invalid name, or hyperparameters that contradict each other; 403, the key may not use the
            model, or create an adapter of this name; 404, it has no such file.
    """
    hyperparameters = _hyperparameters(body)
    settings = {name: value for name, value in (body.lora or {}).items() if value not in (None, "auto")}
    for name, value in hyperparameters.items():
        if name in KEYS and settings.setdefault(KEYS[name], value) != value:
            raise HttpError(400, f"{name} and lora.{KEYS[name]} contradict each other.", param=name)
    request = JobRequest(
        owner=key.name,
        model=_model(state, key, body.model),
        training_file=body.training_file,
        validation_file=body.validation_file,
        method=body.method.type if body.method else "supervised",
        suffix=body.suffix,
        seed=body.seed,
        metadata=body.metadata or {},
        learning_rate_multiplier=hyperparameters.get("learning_rate_multiplier"),
        settings=settings,
    )
    try:
        name = adapter_name(request, state.engine.base, "…")
    except AdapterNameError as error:
        raise HttpError(400, error.message, param="suffix", hint=error.hint) from error
    key.check_create(name, "suffix")
    for field in ("training_file", "validation_file"):
        try:
            training.uploads.get(getattr(body, field) or body.training_file, key.name)
        except UnknownFileError as error:
            raise HttpError(404, error.message, param=field, hint=error.hint) from error
    return request


def _model(state: ServerState, key: "ApiKey", model: str) -> str:
    selection = state.names.parse(model)
    if selection == BASE:
        return state.names.base
    if [weight for _, weight in selection.weights] != [1.0]:
        raise HttpError(400, f"Training cannot go on from the blend {model[:128]!r}.", param="model")
    state.check_adapters(key, selection.names)
    return selection.label


def _hyperparameters(body: FineTuningJobRequest) -> dict[str, Any]:
    """Return those that a body sets, in its older place and in its method."""
    method = body.method or Method(type="supervised")
    settings, other, name = method.supervised, method.dpo, "dpo"
    if method.type == "dpo":
        settings, other, name = method.dpo, method.supervised, "supervised"
    if other is not None:
        raise HttpError(400, f"The type of the method is {method.type}.", param=f"method.{name}")
    older, newer = _values(body.hyperparameters), _values(settings.hyperparameters if settings else None)
    for name in older.keys() & newer.keys():
        if older[name] != newer[name]:
            raise HttpError(400, f"{name} is set twice, differently.", param=f"hyperparameters.{name}")
    return older | newer


def _values(hyperparameters: Hyperparameters | None) -> dict[str, Any]:
    values = msgspec.structs.asdict(hyperparameters) if hyperparameters else {}
    return {name: value for name, value in values.items() if value not in (None, "auto")}


# ---- events as they come


def _stream(request: Request, events: AsyncIterator[EventRecord]) -> EventStream:
    state = state_of(request)

    async def send_all(send_event: SendEvent) -> None:
        async for event in events:
            await send_event(msgspec.json.encode(FineTuningJobEvent.of(event)))

    def report(error: Exception) -> bytes:
        return msgspec.json.encode(ErrorResponse(error_info(error, state.store_path)[0]))

    return EventStream([send_all], last=bytes, on_error=report, close=lambda: None, ping=state.config.ping)
