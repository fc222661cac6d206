"""What clients get, in OpenAI's shapes. Knows fields only."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

Ended = Literal["stop", "length"]


class CachedTokens(msgspec.Struct):
    """Of the prompt, what needed no computing."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(msgspec.Struct):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """A token of an answer, and the likeliest ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Of each token of a message."""

    content: list[TokenLogprob]


class AnswerMessage(msgspec.Struct):
    """The turn that was generated."""

    content: str
    role: Literal["assistant"] = "assistant"


class Delta(msgspec.Struct, omit_defaults=True):
    """What a message grew by."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """One whole answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Ended


class ChatChunkChoice(msgspec.Struct):
    """What one answer grew by."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Ended | None = None


class ChatAnswer(msgspec.Struct):
    """`POST /v1/chat/completions`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    object: Literal["chat.completion"] = "chat.completion"


class ChatChunk(msgspec.Struct):
    """One event of its stream."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class CompletionLogprobs(msgspec.Struct):
    """Of each token of a text; the first of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """One whole text, or what it grew by."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Ended | None = None


class CompletionAnswer(msgspec.Struct):
    """`POST /v1/completions`, and each event of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType = UNSET
    object: Literal["text_completion"] = "text_completion"


class AdapterCard(msgspec.Struct):
    """Ours: what is known of an adapter."""

    rank: int
    alpha: float
    targets: list[str]
    bytes: int
    sha256: str | None
    """None in lists where it would have to be computed; asked for by its id, a model always has it."""
    base_sha256: str | None
    version: int
    loaded: bool
    tier: Literal["device", "memory", "disk"]
    pinned: bool
    last_used: float | None
    """In seconds since 1970; None where it was not used."""


class Permission(msgspec.Struct):
    """vLLM's."""

    id: str
    created: int
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_view: bool = True
    object: Literal["model_permission"] = "model_permission"


class Model(msgspec.Struct):
    """`GET /v1/models/{id}`."""

    id: str
    created: int
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[Permission]
    adapter: AdapterCard | UnsetType = UNSET
    owned_by: str = "loradeck"
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct):
    """`GET /v1/models`."""

    data: list[Model]
    object: Literal["list"] = "list"


class Tokens(msgspec.Struct):
    """`POST /tokenize`."""

    count: int
    max_model_len: int | None
    tokens: list[int]


class Prompt(msgspec.Struct):
    """`POST /detokenize`."""

    prompt: str


class Tokenizer(msgspec.Struct):
    """`GET /tokenizer_info`: what lm-eval needs to have no tokenizer of its own."""

    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    chat_template: str | None


class AdapterScale(msgspec.Struct):
    """`GET /lora-adapters`."""

    id: int
    path: str
    scale: float


class Success(msgspec.Struct):
    """`POST /lora-adapters`."""

    success: bool


class Health(msgspec.Struct):
    """`GET /health`."""

    status: Literal["ok"]


class Version(msgspec.Struct):
    """`GET /version`."""

    version: str
