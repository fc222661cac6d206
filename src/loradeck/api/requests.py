"""What clients ask, as they write it: OpenAI's fields, and vLLM's beside them. Knows types and bounds, no engine."""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

MAX_TOP = 20  # log-probabilities per token: OpenAI's bound
NOT_NEGATIVE = Meta(ge=0, le=2**31)

Natural: TypeAlias = Annotated[int, NOT_NEGATIVE]
Fraction: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
TokenId: TypeAlias = Annotated[int, NOT_NEGATIVE]
Text: TypeAlias = Annotated[str, Meta(min_length=1)]


class Scale(msgspec.Struct):
    """llama.cpp's way to name an adapter: the number that `/lora-adapters` lists, and its weight."""

    id: Natural
    scale: float


class StreamOptions(msgspec.Struct):
    """What a stream tells besides tokens."""

    include_usage: bool = False


class Generation(msgspec.Struct, kw_only=True):
    """What both kinds of generation have in common; what is null is as if it were not there."""

    model: str | None = None
    """An adapter, `base:adapter`, `name@version`, a blend `a*0.7+b*0.3`; the base's name or nothing: the base."""
    adapter_id: str | None = None
    """LoRAX's way to name the adapter."""
    lora: list[Scale] | None = None
    """llama.cpp's; an adapter that is not listed has no weight."""
    max_tokens: Natural | None = None
    min_tokens: Natural | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31)] | None = None
    """-1 and 0 keep all."""
    min_p: Fraction | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    stop: Text | Annotated[list[Text], Meta(max_length=4)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class TextPart(msgspec.Struct):
    """A part of a message; of OpenAI's kinds of parts only text."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct):
    """One turn of a conversation, as the chat template gets it."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatRequest(Generation, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Natural | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP)] | None = None
    tools: list[dict[str, Any]] | None = None
    """Input of the chat template, refused where the template has no place for them. Answers stay text."""
    tool_choice: Literal["none", "auto"] | None = None
    """`none` leaves the tools out of the prompt. Nothing makes a model call one."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Generation, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    """A text, texts, token ids, or lists of token ids; not some of each."""
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP)] | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """`POST /tokenize`: of a text, or of messages as the chat template renders them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


class LoadRequest(msgspec.Struct, kw_only=True):
    """`POST /v1/load_lora_adapter`."""

    lora_name: Text
    lora_path: str = ""
    """A folder of the store, by default the one named as the adapter; another one is published first."""
    load_inplace: bool = False
    """Where the name is taken: publish another version of it."""


class UnloadRequest(msgspec.Struct, kw_only=True):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: Text


# Fields that would change what an answer means, with the values that change nothing.
EITHER_REFUSES: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "grammar": ("",),
    "json_schema": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "prompt_logprobs": (),
}
CHAT_REFUSES: dict[str, tuple[Any, ...]] = {
    **EITHER_REFUSES,
    "response_format": ({"type": "text"},),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"], []),
    "audio": (),
    "web_search_options": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
}
COMPLETION_REFUSES: dict[str, tuple[Any, ...]] = {
    **EITHER_REFUSES,
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "best_of": (0, 1),
}
LOAD_REFUSES: dict[str, tuple[Any, ...]] = {"is_3d_lora_weight": (False,)}
