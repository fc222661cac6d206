"""`POST /v1/fine_tuning/plan`: what a job would do, without creating it; an addition to OpenAI's API."""

import math
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api.errors import HttpError, invalid_field
from loradeck.api.fine_tuning import job_request
from loradeck.api.requests import read_body
from loradeck.api.responses import json_response
from loradeck.api.state import state_of, training_of
from loradeck.api.streaming import run_until_disconnect
from loradeck.api.training_requests import FineTuningJobRequest
from loradeck.errors import DataError, TargetError
from loradeck.live.records import file_of

if TYPE_CHECKING:
    from loradeck.live.previews import JobPreview


class PlannedSetting(msgspec.Struct):
    """A setting of a job."""

    name: str
    value: Any
    reason: str
    """Why it has this value."""


class FineTuningPlan(msgspec.Struct, kw_only=True):
    """What a job would do."""

    name: str
    """The adapter's name; with "…" in place of the id that a job without a suffix has in it."""
    form: str
    """How the file's records are written."""
    examples: int
    validation_examples: int
    tokens: int
    """Of one epoch."""
    supervised: int
    """Those of them that are trained on."""
    longest: int
    """Tokens of the longest example."""
    truncated: int
    """Examples cut to max_length."""
    steps: int
    total_tokens: int
    """Of all epochs."""
    trainable: int
    """Parameters of the adapter."""
    adapter_bytes: int
    memory_bytes: int
    """Of the adapter and its optimizer, while it trains."""
    learning_rate: float
    """The highest that it reaches."""
    settings: list[PlannedSetting]
    notes: list[str]
    """What is passed over, left out, or read otherwise than written."""
    object: Literal["fine_tuning.plan"] = "fine_tuning.plan"

    @classmethod
    def of(cls, preview: "JobPreview") -> "FineTuningPlan":
        """Return a plan as clients read it."""
        return cls(
            name=preview.name,
            form=preview.form,
            examples=preview.examples,
            validation_examples=preview.validation_examples,
            tokens=preview.tokens,
            supervised=preview.supervised,
            longest=preview.longest,
            truncated=preview.truncated,
            steps=preview.steps,
            total_tokens=preview.total_tokens,
            trainable=preview.trainable,
            adapter_bytes=preview.adapter_bytes,
            memory_bytes=preview.memory_bytes,
            learning_rate=preview.learning_rate,
            settings=[PlannedSetting(name, _json(value), reason) for name, (value, reason) in preview.settings.items()],
            notes=[*preview.notes],
        )


async def plan_job(request: Request) -> Response:
    """Say what a job would do: its steps, its memory, and each setting with the reason for it. Nothing is created."""
    training, state, key = training_of(request), state_of(request), request.state.key
    body = await read_body(request, FineTuningJobRequest, state.config.max_body_bytes)
    job = await run_sync(job_request, state, training, key, body)

    async def plan() -> "JobPreview":
        async with state.lock(f"previews of {key.name}"):  # one at a time, so that others have their turn
            return await training.previews.plan(job, key.quota)

    try:
        with invalid_field("lora"):
            (preview,) = await run_until_disconnect(request.receive, plan())
    except TargetError as error:
        raise HttpError(400, error.text("http"), param="lora") from error
    except DataError as error:
        param, text = file_of(error.text("http"))
        raise HttpError(400, text, param=param) from error
    return json_response(FineTuningPlan.of(preview))


def _json(value: object) -> object:
    """Return a setting's value as JSON can write it; infinity becomes a text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
