"""`POST /evaluate`: adapters and the base measured side by side on a client's examples.

Every sequence and every question is a request of the engine, beside those of other clients.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api.auth import ApiKey
from loradeck.api.errors import HttpError, invalid_field, shutting_down
from loradeck.api.model_name import BASE, AdapterSelection
from loradeck.api.requests import EvaluateRequest, read_body
from loradeck.api.responses import json_response
from loradeck.api.state import ServerState, state_of
from loradeck.api.streaming import run_until_disconnect
from loradeck.dataset.example import UNSUPERVISED, Example, Preference
from loradeck.dataset.example import examples as tokenize
from loradeck.dataset.record import parse
from loradeck.errors import DataError
from loradeck.evaluation.config import EvalConfig
from loradeck.evaluation.question import Question, questions_of
from loradeck.evaluation.report import Report, report
from loradeck.sampling import SamplingParams

if TYPE_CHECKING:
    from loradeck.serve.generation import Generation

MAX_LENGTH = 1024  # tokens of a sequence, unless the request says otherwise: as in training
SETTINGS = ("exact_match", "samples", "max_new_tokens", "dpo_beta")  # that the request and EvalConfig share


async def evaluate(request: Request) -> Response:
    """Measure adapters, and the base, on examples."""
    state = state_of(request)
    body = await read_body(request, EvaluateRequest, state.config.max_body_bytes)
    evaluation = await run_sync(_prepare, state, request.state.key, body)
    tasks = iter(evaluation.tasks())
    workers = max(1, state.engine.config.max_rows // 2)  # the other rows stay free for other clients
    try:
        await run_until_disconnect(request.receive, *(_work(evaluation, tasks) for _ in range(workers)))
    finally:
        evaluation.close()
    return json_response(await run_sync(evaluation.report))


@dataclass(frozen=True, slots=True)
class Task:
    """One request of the engine: the sequence or, if it generates, the question number `index` of an adapter."""

    adapter: str
    index: int
    generates: bool


@dataclass(slots=True)
class Evaluation:
    """The examples and adapters of one request, and what was computed for them so far."""

    state: ServerState
    tenant: str
    config: EvalConfig
    adapters: dict[str, AdapterSelection]
    """By their names in the report; the base is the first."""
    examples: Sequence[Example] | Sequence[Preference]
    rows: Sequence[Example]
    """The sequences of the examples."""
    questions: Sequence[Question]
    generations: "list[Generation]" = field(default_factory=list)
    closed: bool = False
    """Nobody waits for it any more."""
    losses: dict[str, list[float]] = field(init=False)
    answers: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.losses = {name: [0.0] * len(self.rows) for name in self.adapters}
        self.answers = {name: [""] * len(self.questions) for name in self.adapters}

    def tasks(self) -> Iterator[Task]:
        """Yield what is to be computed; the adapters of a sequence follow each other."""
        for generates, count in ((False, len(self.rows)), (True, len(self.questions))):
            for index in range(count):
                yield from (Task(name, index, generates) for name in self.adapters)

    def submit(self, task: Task) -> "Generation":
        """Submit a task to the engine; its generation is in `generations`. Reads the disk."""
        selection = self.adapters[task.adapter]
        tokens = self.questions[task.index].prompt if task.generates else self.rows[task.index].tokens
        if task.generates:
            sampling = SamplingParams(max_tokens=self.config.max_new_tokens)
        else:
            sampling = SamplingParams(max_tokens=0, prompt_logprobs=0)
        generation = self.state.generator.submit(
            tokens, selection.entry, sampling, tenant=self.tenant, adapter=selection.label, continues=False
        )
        self.generations.append(generation)
        self.state.live.add(generation)
        if self.closed:  # meanwhile: a client that disconnects does not wait for this thread
            self.close()
        return generation

    def close(self) -> None:
        """Cancel what has not ended."""
        self.closed = True
        self.state.release([*self.generations])

    def record(self, task: Task, generation: "Generation", text: str) -> None:
        """Record what the engine computed for a task."""
        if task.generates:
            self.answers[task.adapter][task.index] = text
            return
        labels = self.rows[task.index].labels
        self.losses[task.adapter][task.index] = -sum(
            token.logprob or 0.0
            for token, label in zip(generation.prompt[1:], labels[1:], strict=True)
            if label != UNSUPERVISED
        )

    def report(self) -> Report:
        """Return the report."""
        reference = next(iter(self.losses.values())) if isinstance(self.examples[0], Preference) else None
        tokenizer = self.state.engine.base.tokenizer
        return report(self.examples, self.losses, reference, self.questions, self.answers, self.config, tokenizer)


async def _work(evaluation: Evaluation, tasks: Iterator[Task]) -> None:
    """Compute one task after the other, until none is left."""
    for task in tasks:
        generation = await run_sync(evaluation.submit, task)
        text = "".join([chunk.text async for chunk in generation.chunks()])
        if generation.finish == "cancelled":
            raise shutting_down()
        evaluation.record(task, generation, text)


def _prepare(state: ServerState, key: ApiKey, body: EvaluateRequest) -> Evaluation:
    """Read and check a request. Reads the disk.

    Raises:
        HttpError: 400, an invalid field, or too much to compute; 403, the key may not use an adapter.
        UnknownAdapterError: there is no such adapter.
    """
    settings = {name: value for name in SETTINGS if (value := getattr(body, name)) is not None}
    with invalid_field("settings"):
        config = EvalConfig(**settings)
    adapters = _adapters(state, key, body.adapters)
    examples = _examples(state, body.examples, body.max_length or MAX_LENGTH)
    rows = [each for example in examples for each in example.sequences]
    questions = questions_of(examples, state.engine.base.tokenizer)
    questions = questions[: config.answered(len(questions))]
    count, limit = (len(rows) + len(questions)) * len(adapters), state.config.max_eval_rows
    if count > limit:
        message = (
            f"{len(rows)} sequences and {len(questions)} questions for {len(adapters)} models, the base among them, "
            f"are {count} rows; the limit is {limit}."
        )
        raise HttpError(400, message, param="examples")
    return Evaluation(state, key.name, config, adapters, examples, rows, questions)


def _adapters(state: ServerState, key: ApiKey, names: Sequence[str]) -> dict[str, AdapterSelection]:
    """Return the base and the adapters, each at the version that is the latest now."""
    adapters = {state.names.base: BASE}
    for name in names:
        selection = state.names.parse(name, "adapters")
        state.check_adapters(key, selection.names)
        if selection != BASE:
            find = state.engine.adapter_cache.find
            weights = tuple((find(spec).spec, weight) for spec, weight in selection.weights)
            adapters[name] = AdapterSelection(weights)
    return adapters


def _examples(state: ServerState, records: Sequence[dict[str, Any]], max_length: int) -> list[Any]:
    """Return the examples of records, all of one kind."""
    examples: list[Any] = []
    for index, record in enumerate(records):
        try:
            examples += tokenize(parse(msgspec.json.encode(record)), state.engine.base.tokenizer, max_length)
        except DataError as error:
            raise HttpError(400, error.message.removeprefix("$: "), param=f"examples[{index}]") from error
        if isinstance(examples[-1], Preference) != isinstance(examples[0], Preference):
            raise HttpError(400, "Preference pairs cannot be mixed with others.", param=f"examples[{index}]")
    return examples
