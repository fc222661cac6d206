"""Token ids of texts and conversations; tools, continuations and the variables of a chat template."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loradeck.api import tokenization
from loradeck.api.errors import HttpError
from loradeck.api.requests import ChatCompletionRequest, ChatMessage, TextPart

USER = ChatMessage("user", "hi")
WITH_TOOLS = "{% if tools %}{{ tools | length }} tools{% endif %}{% for m in messages %}{{ m.content }}{{ m.tool_calls[0].function.arguments.x if m.tool_calls }}{% endfor %}{{ mood }}"


def text(tokenizer: PreTrainedTokenizerFast, *messages: ChatMessage, **fields: Any) -> str:
    return str(
        tokenizer.decode(
            tokenization.encode_messages(tokenizer, ChatCompletionRequest(messages=list(messages), **fields))
        )
    )


@pytest.fixture
def tools_tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = WITH_TOOLS
    return tokenizer


def test_a_conversation(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    beginning = "<|im_start|>user\nhi<|im_end|>\n"
    assert text(tiny_tokenizer, USER) == beginning + "<|im_start|>assistant\n"
    assert text(tiny_tokenizer, USER, add_generation_prompt=False) == beginning
    parts = [TextPart("text", "h"), TextPart("text", "i")]
    assert text(tiny_tokenizer, ChatMessage("user", parts), add_generation_prompt=False) == beginning.replace(
        "hi", "h\ni"
    )


def test_the_last_message_can_be_continued(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = text(tiny_tokenizer, USER, ChatMessage("assistant", "Well"), continue_final_message=True)
    assert rendered.endswith("<|im_start|>assistant\nWell")
    with pytest.raises(HttpError, match="contradict"):
        text(tiny_tokenizer, USER, continue_final_message=True, add_generation_prompt=True)


def test_tools_require_a_template_that_reads_them(
    tiny_tokenizer: PreTrainedTokenizerFast, tools_tokenizer: PreTrainedTokenizerFast
) -> None:
    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(HttpError, match="ignores tools") as caught:
        text(tiny_tokenizer, USER, tools=tools)
    assert caught.value.param == "tools"
    assert text(tools_tokenizer, USER, tools=tools) == "1 toolshi"
    assert text(tools_tokenizer, USER, tools=tools, tool_choice="none") == "hi"
    calls: list[Any] = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}]
    assert text(tools_tokenizer, ChatMessage("assistant", None, tool_calls=calls)) == "7"
    calls[0]["function"]["arguments"] = "{"
    with pytest.raises(HttpError, match="Invalid JSON"):
        text(tools_tokenizer, ChatMessage("assistant", None, tool_calls=calls))


def test_template_variables_cannot_replace_arguments(tools_tokenizer: PreTrainedTokenizerFast) -> None:
    assert text(tools_tokenizer, USER, chat_template_kwargs={"mood": "glad"}) == "higlad"
    for name in ("chat_template", "tokenize", "tools", "tokenizer_kwargs"):
        with pytest.raises(HttpError, match=name):
            text(tools_tokenizer, USER, chat_template_kwargs={name: "{{ 7 * 7 }}"})
    with pytest.raises(HttpError, match="rejects"):
        text(tools_tokenizer, USER, chat_template_kwargs={"messages": []})


def test_a_base_without_a_template_refuses_messages(tools_tokenizer: PreTrainedTokenizerFast) -> None:
    tools_tokenizer.chat_template = None
    with pytest.raises(HttpError, match="no chat template"):
        text(tools_tokenizer, USER)


def test_prompts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenization.encode_prompts(tiny_tokenizer, "ab")
    assert tokenization.encode_prompts(tiny_tokenizer, ["ab", "ab"]) == ids * 2
    assert tokenization.encode_prompts(tiny_tokenizer, ids[0]) == ids
    assert tokenization.encode_prompts(tiny_tokenizer, ids) == ids
    for invalid in ([1, "a"], [[1], "a"], [[1], [260]]):
        with pytest.raises(HttpError) as caught:
            tokenization.encode_prompts(tiny_tokenizer, invalid)
        assert caught.value.param == "prompt"
