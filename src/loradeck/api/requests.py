"""Request bodies: OpenAI's fields, vLLM's and llama.cpp's beside them, and how a body is read and validated."""

import logging
import re
from codecs import BOM_UTF8
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta
from starlette.requests import Request

from loradeck.api.coercion import coercion
from loradeck.api.errors import HttpError
from loradeck.api.responses import JSON

MAX_TOP_LOGPROBS = 20  # OpenAI's limit
MAX_EVAL_ADAPTERS = 256
MAX_WEIGHT = 1e6  # of an adapter; beyond it float32 has no digits left for what the base computes
MAX_BLEND = 64  # adapters; each one is looked up on disk
MAX_STOP_STRINGS = 256  # each is looked for at every token; OpenAI takes four, vLLM any number
MAX_STOP_LENGTH = 4096  # characters
MAGICS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # how compressed data begins; no JSON does

NonNegativeInt: TypeAlias = Annotated[int, Meta(ge=0, le=2**31)]
TokenId: TypeAlias = NonNegativeInt
Probability: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
NonEmptyStr: TypeAlias = Annotated[str, Meta(min_length=1)]
Binary: TypeAlias = Annotated[str, Meta(extra_json_schema={"format": "binary"})]
Weight: TypeAlias = Annotated[float, Meta(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]
StopString: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]
Unsupported: TypeAlias = Mapping[str, tuple[Any, ...]]
"""Fields that would change what an answer means, each with the values that change nothing and are accepted."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class LoraScale(msgspec.Struct):
    """llama.cpp's way to select an adapter: its id in `GET /lora-adapters`, and its weight."""

    id: NonNegativeInt
    scale: Weight


class StreamOptions(msgspec.Struct):
    """Options of a stream."""

    include_usage: bool = False


class AdapterRequest(msgspec.Struct, kw_only=True):
    """The fields with which a request selects its adapters; null means the default."""

    model: str | None = None
    """An adapter, `base:adapter`, `name@version`, a blend `a*0.7+b*0.3`; the base's name or "" is the base alone."""
    adapter_id: str | None = None
    """LoRAX's way to select an adapter; takes what `model` takes."""
    lora: list[LoraScale] | None = None
    """llama.cpp's way; an adapter that is not listed has weight 0."""
    user: str | None = None


class GenerationRequest(AdapterRequest, kw_only=True):
    """The fields of both kinds of generation; null means the default."""

    max_tokens: NonNegativeInt | None = None
    min_tokens: NonNegativeInt | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31)] | None = None
    """-1 and 0 keep all tokens."""
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    """A stop string may name special tokens, alone or within other text."""
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    """vLLM's: the answer has `token_ids`, and the prompt `prompt_token_ids`."""

    unsupported: ClassVar[Unsupported] = {
        "response_format": ({"type": "text"},),
        "use_beam_search": (False,),
        "structured_outputs": (),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "grammar": ("",),
        "json_schema": (),
        "bad_words": ([],),
        "allowed_token_ids": (),
        "logits_processors": ([],),
        "truncate_prompt_tokens": (),
        "prompt_embeds": (),
        "include_stop_str_in_output": (False,),
        "skip_special_tokens": (True,),
        "prompt_logprobs": (),
        "best_of": (0, 1),
    }


class TextPart(msgspec.Struct):
    """A part of a message; OpenAI's other kinds of parts are not supported."""

    type: Literal["text"]
    text: str


class FunctionCall(msgspec.Struct):
    """A function that the assistant called."""

    name: NonEmptyStr
    arguments: str | dict[str, Any] = ""
    """JSON, as OpenAI writes it in a string."""


class ToolCall(msgspec.Struct):
    """A call of a function; OpenAI's other kinds of tools are not supported."""

    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct):
    """One message of a conversation, as the chat template reads it."""

    role: str
    """The role `developer` is `system`; `function` is `tool`."""
    content: str | list[TextPart] | None = None
    refusal: str | None = None
    """The assistant's content when it refused."""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    """Refused, as messages of tools are, if the chat template leaves them out."""
    function_call: FunctionCall | None = None
    """OpenAI's older form of one tool call."""
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    audio: None = None


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: NonNegativeInt | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    """Input of the chat template; refused if the template ignores them. Answers stay text."""
    tool_choice: Literal["none", "auto"] | None = None
    """`none` leaves the tools out of the prompt. Nothing forces the model to call one."""
    functions: list[dict[str, Any]] | None = None
    """OpenAI's older form of `tools`, and the next one of `tool_choice`."""
    function_call: Literal["none", "auto"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    unsupported: ClassVar[Unsupported] = {
        **GenerationRequest.unsupported,
        "modalities": (["text"], []),
        "audio": (),
        "web_search_options": (),
        "chat_template": (),
        "documents": ([],),
        "echo": (False,),
    }


class CompletionRequest(GenerationRequest, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    """A text, a list of texts, token ids, or lists of token ids; not a mixture."""
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_special_tokens: bool | None = None

    unsupported: ClassVar[Unsupported] = {**GenerationRequest.unsupported, "suffix": ("",)}


class InputRequest(AdapterRequest, kw_only=True):
    """The fields of all that is computed for whole inputs, as vLLM has them: either `input` or `messages`."""

    input: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)] | None = None
    """A text, a list of texts, token ids, or lists of token ids; not a mixture."""
    messages: list[ChatMessage] | None = None
    """One input, as the chat template renders it."""
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    unsupported: ClassVar[Unsupported] = {
        "truncate_prompt_tokens": (),
        "truncation_side": (),
        "padding": ("do_not_pad",),
        "chat_template": (),
        "mm_processor_kwargs": (),
        "normalize": (),
        "softmax": (),
        "activation": (),
    }


class ClassifyRequest(InputRequest, kw_only=True):
    """`POST /classify`."""

    use_activation: bool | None = None
    """False returns logits instead of probabilities."""


class EmbeddingRequest(InputRequest, kw_only=True):
    """`POST /v1/embeddings`."""

    encoding_format: Literal["float", "base64"] | None = None
    """`base64` is that of float32, little-endian."""
    dimensions: Annotated[int, Meta(ge=1, le=2**31)] | None = None
    """Of models whose vectors may be cut (Matryoshka)."""

    unsupported: ClassVar[Unsupported] = {
        **InputRequest.unsupported,
        "use_activation": (),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
    }


class PoolingRequest(EmbeddingRequest, kw_only=True):
    """`POST /pooling`."""

    use_activation: bool | None = None
    """Whether logits become probabilities; true by default, but for a reward."""
    task: str | None = None
    """vLLM's name for what the base does."""

    unsupported: ClassVar[Unsupported] = {
        name: accepted for name, accepted in EmbeddingRequest.unsupported.items() if name != "use_activation"
    }


class ScoreRequest(AdapterRequest, kw_only=True):
    """`POST /score`: one text with each of several others, or each of several with its own."""

    text_1: str | Annotated[list[str], Meta(min_length=1)] | None = None
    text_2: str | Annotated[list[str], Meta(min_length=1)] | None = None
    queries: str | Annotated[list[str], Meta(min_length=1)] | None = None
    """Another name of `text_1`, as is `documents` of `text_2`."""
    documents: str | Annotated[list[str], Meta(min_length=1)] | None = None
    use_activation: bool | None = None
    """Whether a head's score is between 0 and 1; true by default, but for a reward."""

    unsupported: ClassVar[Unsupported] = {
        "truncate_prompt_tokens": (),
        "mm_processor_kwargs": (),
        "data_1": (),
        "data_2": (),
        "items": (),
    }


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """`POST /tokenize`: a text, or messages as the chat template renders them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


class ModelQuery(msgspec.Struct):
    """The parameters of `GET /tokenizer_info`."""

    model: str | None = None


class LoadAdapterRequest(msgspec.Struct, kw_only=True):
    """`POST /v1/load_lora_adapter`."""

    lora_name: NonEmptyStr
    lora_path: str = ""
    """A folder of the store, by default the adapter's own; a folder from elsewhere is published first."""
    load_inplace: bool = False
    """Publish another version if the name exists."""

    unsupported: ClassVar[Unsupported] = {"is_3d_lora_weight": (False,)}


class UnloadAdapterRequest(msgspec.Struct, kw_only=True):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: NonEmptyStr


class UploadAdapterRequest(msgspec.Struct, kw_only=True):
    """`POST /v1/adapters`, a form."""

    name: NonEmptyStr
    file: Annotated[list[Binary], Meta(min_length=1)]
    """The files of a PEFT folder, each with its path as the filename, or one .zip of them."""


class CombineRequest(msgspec.Struct, kw_only=True):
    """`POST /v1/adapters/combine`."""

    name: NonEmptyStr
    weights: Annotated[dict[str, Weight], Meta(min_length=1, max_length=MAX_BLEND)]
    """Of each adapter, `name` or `name@version`."""
    max_rank: Annotated[int, Meta(ge=1, le=2**16)] | None = None
    """Lower ranks above this one, by SVD; by default the ranks add up and the blend is exact."""


class ComparisonQuery(msgspec.Struct, kw_only=True):
    """The parameters of `GET /v1/adapters/compare`: two adapters, each `name` or `name@version`."""

    a: NonEmptyStr
    b: NonEmptyStr


class EvaluateRequest(msgspec.Struct, kw_only=True):
    """`POST /evaluate`; null means the default."""

    examples: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    """Records in any form of a dataset."""
    adapters: Annotated[list[str], Meta(max_length=MAX_EVAL_ADAPTERS)] = []
    """What `model` takes; the base is always evaluated too."""
    exact_match: bool | None = None
    samples: NonNegativeInt | None = None
    max_new_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    max_length: Annotated[int, Meta(ge=2, le=2**31)] | None = None
    """Maximum tokens of a sequence; longer ones are cut at the end."""
    dpo_beta: Annotated[float, Meta(gt=0, le=1e9)] | None = None

    # Compiling or matching a stranger's regular expression can take all memory or time; clients match the samples.
    unsupported: ClassVar[Unsupported] = {"pattern": ()}


async def read_body(request: Request, kind: type[T], max_bytes: int) -> T:
    """Return a request's JSON body as a `kind`; unknown fields are ignored.

    A whole number may be written as 4.0, and null means a field's default.

    Raises:
        HttpError: 415, its content type is not JSON or it is compressed; 413, it has more than `max_bytes`; 400 with
            the name of the field, it is invalid or sets one of the kind's `unsupported` fields.
    """
    # Any other content type can be sent to a server on the loopback by a web page, without a CORS preflight.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise HttpError(415, f"The content-type of a request must be {JSON}.")
    encoding = request.headers.get("content-encoding", "").strip().lower() or "identity"
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise HttpError(413, f"The request body is larger than {max_bytes} bytes.")
    if encoding == "identity":
        encoding = next((name for magic, name in MAGICS.items() if body.startswith(magic)), encoding)
    if encoding != "identity":
        raise HttpError(
            415,
            f"The body is compressed with {encoding[:128]!r}.",
            hint="Send it without a content-encoding.",
            headers={"accept-encoding": "identity"},
        )
    try:
        fields = coercion(kind)(msgspec.json.decode(body.removeprefix(BOM_UTF8)))  # as clients on Windows write it
        value = msgspec.convert(fields, kind, str_keys=True)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        if str(error) == "Input data was truncated":  # msgspec's words for an empty body too
            raise HttpError(400, "The body is empty or incomplete JSON.") from error
        raise HttpError(400, str(error), param=_invalid_field(str(error))) from error
    if isinstance(fields, dict):
        _check_fields(fields, kind)
    return value


def read_query(request: Request, kind: type[T]) -> T:
    """Return the parameters of a request's URL as a `kind`; unknown ones are ignored.

    Raises:
        HttpError: 400 with the name of the parameter.
    """
    try:
        return msgspec.convert(dict(request.query_params), kind, strict=False)
    except msgspec.ValidationError as error:
        raise HttpError(400, str(error), param=_invalid_field(str(error))) from error


def _invalid_field(message: str) -> str | None:
    """Return the field that an error of msgspec names, such as `messages[0].role`."""
    path = re.search(r"`\$\.?([^`]*)`$", message)
    missing = re.match(r"Object missing required field `(\w+)`", message)
    return ".".join(match[1] for match in (path, missing) if match and match[1]) or None


def _check_fields(fields: Mapping[str, Any], kind: Any) -> None:
    unsupported: Unsupported = getattr(kind, "unsupported", {})
    for name, accepted in unsupported.items():
        if fields.get(name) not in (None, *accepted):
            raise HttpError(400, f"Unsupported: {name}={fields[name]!r:.80}.", param=name)
    unknown = fields.keys() - {*kind.__struct_fields__, *unsupported}
    if unknown:
        log.debug("ignored fields of a %s: %s", kind.__name__, ", ".join(sorted(unknown)))
