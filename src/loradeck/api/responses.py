"""Response bodies, in the shapes of OpenAI's, vLLM's and llama.cpp's servers."""

from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

JSON = "application/json"
FinishReason = Literal["stop", "length"]
TokenIds: TypeAlias = list[int] | UnsetType
"""There if the request asks for them with `return_token_ids`."""


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with a body of JSON."""
    return Response(msgspec.json.encode(body), status, headers, JSON)


# ---- errors


class ErrorInfo(msgspec.Struct):
    """What went wrong; `param` is the field that caused it."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(msgspec.Struct):
    """The body of every response that is not a success."""

    error: ErrorInfo


# ---- generation


class PromptTokensDetails(msgspec.Struct):
    """Prompt tokens that came from the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens of a request: of its distinct prompts, and of all its answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    """A token of an answer, and the most likely tokens at its position."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a message, token by token."""

    content: list[TokenLogprob]


class AssistantMessage(msgspec.Struct):
    """The generated message."""

    content: str
    role: Literal["assistant"] = "assistant"


class MessageDelta(msgspec.Struct, omit_defaults=True):
    """The part of a message in one chunk of a stream."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: TokenIds = UNSET


class ChatChunkChoice(msgspec.Struct):
    """The part of one answer in one chunk of a stream."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: TokenIds = UNSET


class ChatCompletion(msgspec.Struct):
    """`POST /v1/chat/completions`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_token_ids: TokenIds = UNSET
    object: Literal["chat.completion"] = "chat.completion"


class ChatCompletionChunk(msgspec.Struct):
    """One event of its stream."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType = UNSET
    prompt_token_ids: TokenIds = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a text, token by token; the first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """One answer, or the part of it in one event of a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    token_ids: TokenIds = UNSET
    prompt_token_ids: TokenIds = UNSET


class TextCompletion(msgspec.Struct):
    """`POST /v1/completions`, and each event of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType = UNSET
    object: Literal["text_completion"] = "text_completion"


# ---- classes, vectors, scores


class Classification(msgspec.Struct):
    """`POST /classify`: an input's probabilities, and the name of the likeliest label."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Embedding(msgspec.Struct):
    """`POST /v1/embeddings`: an input's vector, as numbers or as base64 of float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class Pooled(msgspec.Struct):
    """`POST /pooling`: an input's vector, or what a head says of it or of each of its tokens."""

    index: int
    data: list[float | list[float]] | str
    object: Literal["pooling"] = "pooling"


class Score(msgspec.Struct):
    """`POST /score`: what a head says of two texts, or the cosine of their vectors."""

    index: int
    score: float
    object: Literal["score"] = "score"


Result = TypeVar("Result")


class ResultList(msgspec.Struct, Generic[Result]):
    """One result for each input, in their order."""

    id: str
    created: int
    model: str
    data: list[Result]
    usage: Usage
    object: Literal["list"] = "list"


# ---- models and adapters


class AdapterDetails(msgspec.Struct):
    """Ours: an adapter's configuration, content and location."""

    rank: int
    alpha: float
    targets: list[str]
    bytes: int
    sha256: str | None
    """Null in lists where it would have to be computed; `GET /v1/models/{id}` always has it."""
    base_sha256: str | None
    version: int
    loaded: bool
    tier: Literal["device", "memory", "disk"]
    pinned: bool
    last_used: float | None
    """Seconds since 1970; null if its tier is `disk`."""


class ModelPermission(msgspec.Struct):
    """vLLM's."""

    id: str
    created: int
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_view: bool = True
    object: Literal["model_permission"] = "model_permission"


class ModelCard(msgspec.Struct):
    """`GET /v1/models/{id}`."""

    id: str
    created: int
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[ModelPermission]
    adapter: AdapterDetails | UnsetType = UNSET
    owned_by: str = "loradeck"
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct):
    """`GET /v1/models`."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class ModelDeleted(msgspec.Struct):
    """`DELETE /v1/models/{id}`."""

    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


class ModuleComparison(msgspec.Struct):
    """What two adapters change at one module: Frobenius norms of the updates, with their scalings."""

    path: str
    norm_a: float
    """0 if the adapter leaves the module alone, as in the next one."""
    norm_b: float
    distance: float | None
    """|A - B| / |A|; null if only A is zero."""
    similarity: float | None
    """The cosine of the two; null if one is zero."""


class AdapterComparison(msgspec.Struct):
    """`GET /v1/adapters/compare`."""

    a: str
    """As `name@version`, as the next one."""
    b: str
    distance: float | None
    """That of all modules together."""
    modules: list[ModuleComparison]
    object: Literal["adapter.comparison"] = "adapter.comparison"


class LoraAdapter(msgspec.Struct):
    """An entry of `GET /lora-adapters`."""

    id: int
    path: str
    scale: float


class SuccessResponse(msgspec.Struct):
    """`POST /lora-adapters`."""

    success: bool


# ---- the tokenizer, and the server itself


class TokenizeResponse(msgspec.Struct):
    """`POST /tokenize`."""

    count: int
    max_model_len: int | None
    tokens: list[int]


class DetokenizeResponse(msgspec.Struct):
    """`POST /detokenize`."""

    prompt: str


class TokenizerInfo(msgspec.Struct):
    """`GET /tokenizer_info`: with it lm-eval needs no tokenizer of its own."""

    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    chat_template: str | None


class HealthResponse(msgspec.Struct):
    """`GET /health`."""

    status: Literal["ok"]


class VersionResponse(msgspec.Struct):
    """`GET /version`."""

    version: str
