"""Token ids of texts and conversations; tools, continuations and the variables of a chat template."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loradeck.api import tokenization
from loradeck.api.errors import HttpError
from loradeck.api.requests import ChatCompletionRequest, ChatMessage, FunctionCall, TextPart, ToolCall

USER = ChatMessage("user", "hi")
WITH_TOOLS = (  # written as Qwen's and Hermes'
    "{% if tools %}{{ tools | length }} tools{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}[{{ m.content }}]{% else %}{{ m.role[0] }}:{{ m.content }}"
    "{% for call in m.tool_calls %}<{{ call.function.name }}({{ call.function.arguments | tojson }})>{% endfor %}"
    "{% endif %}{% endfor %}{{ mood }}"
)
CALL = ToolCall(FunctionCall("add", '{"x": 7}'))


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
    assert text(tools_tokenizer, USER, tools=tools) == "1 toolsu:hi"
    assert text(tools_tokenizer, USER, tools=tools, tool_choice="none") == "u:hi"
    assert text(tools_tokenizer, USER, functions=[{"name": "f", "parameters": {}}]) == "1 toolsu:hi"
    assert text(tools_tokenizer, USER, functions=[{"name": "f"}], function_call="none") == "u:hi"
    with pytest.raises(HttpError, match="ignores tools") as caught:
        text(tiny_tokenizer, USER, functions=[{"name": "f"}])
    assert caught.value.param == "functions"


def test_tool_calls_and_results_are_in_the_prompt(tools_tokenizer: PreTrainedTokenizerFast) -> None:
    answer = ChatMessage("assistant", tool_calls=[CALL, ToolCall(FunctionCall("now"), id="2")])
    results = [ChatMessage("tool", "8", tool_call_id="1"), ChatMessage("tool", "noon", tool_call_id="2")]
    assert text(tools_tokenizer, USER, answer, *results) == 'u:hia:<add({"x": 7})><now({})>[8][noon]'
    older = [
        ChatMessage("assistant", function_call=FunctionCall("add", '{"x": 7}')),
        ChatMessage("function", "8", name="add"),
    ]
    assert text(tools_tokenizer, USER, *older) == 'u:hia:<add({"x": 7})>[8]'
    with pytest.raises(HttpError, match="Invalid JSON"):
        text(tools_tokenizer, ChatMessage("assistant", tool_calls=[ToolCall(FunctionCall("f", "{"))]))


HISTORIES = {
    "tool calls": [ChatMessage("assistant", tool_calls=[CALL])],
    "tool calls beside a content that names them": [ChatMessage("assistant", "add add", tool_calls=[CALL])],
    "tool calls of another role": [ChatMessage("user", "", tool_calls=[CALL])],
    "function_call": [ChatMessage("assistant", function_call=CALL.function)],
    "tool messages": [ChatMessage("assistant", "ok"), ChatMessage("tool", "8")],
    "a function's message": [ChatMessage("assistant", "ok"), ChatMessage("function", "8", name="f")],
}
TEMPLATES = {
    "any role": "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}",
    "tools, but no calls": "{{ tools }}{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_a_history_with_tools_is_refused_where_the_template_leaves_it_out(
    tools_tokenizer: PreTrainedTokenizerFast, template: str, history: list[ChatMessage]
) -> None:
    tools_tokenizer.chat_template = template
    tools: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    with pytest.raises(HttpError, match="ignores tool") as caught:
        text(tools_tokenizer, USER, *history, tools=tools if "tools" in template else None)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_template_that_leaves_out_some_of_the_calls_is_refused(tools_tokenizer: PreTrainedTokenizerFast) -> None:
    tools_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.tool_calls[0].function.name if m.tool_calls }}{% endfor %}"
    )
    assert text(tools_tokenizer, USER, ChatMessage("assistant", tool_calls=[CALL])) == "add"
    with pytest.raises(HttpError, match="ignores tool calls"):
        text(tools_tokenizer, USER, ChatMessage("assistant", tool_calls=[CALL, CALL]))


# ---- roles


def test_a_developer_is_the_system(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    system, developer = ChatMessage("system", "Rhyme."), ChatMessage("developer", "Be brief.")
    once = "<|im_start|>system\nBe brief.<|im_end|>\n"
    rest = text(tiny_tokenizer, USER)
    assert text(tiny_tokenizer, developer, USER) == once + rest
    assert text(tiny_tokenizer, system, developer, USER) == once.replace("Be", "Rhyme.\n\nBe") + rest
    assert text(tiny_tokenizer, developer, system, USER) == once.replace("brief.", "brief.\n\nRhyme.") + rest
    assert text(tiny_tokenizer, USER, developer).count("system") == 1
    assert text(tiny_tokenizer, system, system, USER).count("system") == 2  # as they were given


def test_roles_that_the_template_does_not_know_are_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, tools_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(HttpError, match="knows no role 'sytem'") as caught:
        text(tiny_tokenizer, USER, ChatMessage("sytem", "Rhyme."))
    assert (caught.value.status, caught.value.param) == (400, "messages[1].role")
    tools_tokenizer.chat_template = (
        "{% for m in messages %}{{ '!' if m.role == \"ipython\" }}{{ m.content }}{% endfor %}"
    )
    assert text(tools_tokenizer, USER, ChatMessage("ipython", "8")) == "hi!8"


def test_a_template_of_several_knows_the_roles_of_each(tools_tokenizer: PreTrainedTokenizerFast) -> None:
    tools_tokenizer.chat_template = {"default": WITH_TOOLS, "rag": "{{ 'documents' }}"}  # type: ignore[assignment]
    history = [ChatMessage("assistant", tool_calls=[CALL]), ChatMessage("tool", "8"), ChatMessage("documents", "d")]
    assert text(tools_tokenizer, USER, *history).endswith("[8]d:d")


def test_a_refusal_is_the_assistants_content(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert "assistant\nNo." in text(tiny_tokenizer, USER, ChatMessage("assistant", refusal="No."), USER)


def test_template_variables_cannot_replace_arguments(tools_tokenizer: PreTrainedTokenizerFast) -> None:
    assert text(tools_tokenizer, USER, chat_template_kwargs={"mood": "glad"}) == "u:higlad"
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
