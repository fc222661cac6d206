"""Real chat templates, each reduced to the habit that can make a mask wrong."""

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loradeck.dataset.message import Message
from loradeck.dataset.record import Conversation, Span
from loradeck.dataset.template import PLACEHOLDER, fold_system, marks, sequences
from loradeck.errors import DataError

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Llama 3: turns are trimmed, nothing marks the assistant's; a call of a tool stands in the place of the content.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if 'tool_calls' in m %}{% set call = m.tool_calls[0].function %}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
    "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Qwen 3: the last answer thinks, if only emptily; thinking is taken out of all before the last question.
QWEN = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(asked=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}"
    "{% set thought = m.reasoning_content or (parts[0].split('<think>')[-1] if parts | length > 1 else '') %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.asked and (loop.last or thought) %}<think>\n{{ thought | trim }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>{{ m.content }}</tool_response><|im_end|>\n"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
# Gemma: another name for the assistant, and no system turn.
GEMMA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Mistral: no header before an answer and so no generation prompt; the system's text stands in the last question.
MISTRAL = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}"
    "{% set last = (turns | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{% for m in turns %}{% if m.role == 'user' %}[INST] {{ system + '\n\n' if system and m == last }}{{ m.content }} "
    "[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# DeepSeek R1: it is asked to think, and its thinking is taken out of every answer.
DEEPSEEK = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = Message(
    "assistant", "", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {"in": "Rome"}}}]
)
HI, AHOY, BYE, FAIR = (
    Message("user", "Hi"),
    Message("assistant", " Ahoy "),
    Message("user", "Bye"),
    Message("assistant", "Fair winds"),
)
TALK = [HI, AHOY, BYE, FAIR]


def render(
    tokenizer: PreTrainedTokenizerFast, template: str, messages: list[Message], tools: Any = None
) -> list[list[Span]]:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return list(sequences(other, Conversation(messages, tools)))


def trained(rendered: list[list[Span]]) -> list[list[str]]:
    return [[text for text, is_trained in spans if is_trained] for spans in rendered]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA, ["Ahoy<|eot_id|>", "Fair winds<|eot_id|>"]),
        (GEMMA, ["Ahoy<end_of_turn>", "Fair winds<end_of_turn>"]),
        (MISTRAL, ["Ahoy<|im_end|>", "Fair winds<|im_end|>"]),
        ("{% for m in messages %}" + TURN + "{% endfor %}" + ASK, [" Ahoy <|im_end|>", "Fair winds<|im_end|>"]),
    ],
)
def test_answers_and_their_ends_are_trained_on_though_no_template_marks_them(
    tiny_tokenizer: PreTrainedTokenizerFast, template: str, expected: list[str]
) -> None:
    [spans] = render(tiny_tokenizer, template, TALK)
    assert trained([spans]) == [expected]
    assert all(text not in span for text in ("Ahoy", "Fair") for span, is_trained in spans if not is_trained)


def test_a_mark_for_the_assistants_text_changes_nothing(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    marked = TURN.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    plain, with_marks = ("{% for m in messages %}" + turn + "{% endfor %}" + ASK for turn in (TURN, marked))
    assert render(tiny_tokenizer, with_marks, TALK) == render(tiny_tokenizer, plain, TALK)


def test_an_empty_thinking_block_from_the_template_is_context(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for answer in ("Ahoy", "<think>\n\n</think>\n\nAhoy", "<think></think>Ahoy"):
        [[(read, _), (answered, is_trained)]] = render(tiny_tokenizer, QWEN, [HI, Message("assistant", answer)])
        assert read.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert (answered, is_trained) == ("Ahoy<|im_end|>", True)


def test_an_empty_thinking_block_in_the_file_is_context_too(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    spans = render(tiny_tokenizer, LLAMA, [HI, Message("assistant", "<think>\n</think>\nAhoy")])
    assert trained(spans) == [["Ahoy<|eot_id|>"]]


def test_a_template_that_drops_earlier_thinking_gets_a_sequence_for_each_answer(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    thoughtful = [
        HI,
        Message("assistant", "Ahoy", "greet"),
        BYE,
        Message("assistant", "<think>\npart\n</think>\n\nBye"),
    ]
    first, second = render(tiny_tokenizer, QWEN, thoughtful)
    assert trained([first, second]) == [
        ["<think>\ngreet\n</think>\n\nAhoy<|im_end|>"],
        ["<think>\npart\n</think>\n\nBye<|im_end|>"],
    ]
    assert second[0] == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nAhoy<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        False,
    )


def test_a_system_message_that_moves_gets_a_sequence_for_each_answer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    spans = render(tiny_tokenizer, MISTRAL, [Message("system", "Pirate."), *TALK])
    assert trained(spans) == [["Ahoy<|im_end|>"], ["Fair winds<|im_end|>"]]
    assert spans[1][0][0] == "<|im_start|>[INST] Hi [/INST] Ahoy<|im_end|>[INST] Pirate.\n\nBye [/INST] "


def test_tool_calls_are_trained_on_and_their_results_are_context(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert trained(render(tiny_tokenizer, LLAMA, [HI, CALL, BYE, AHOY])) == [
        ['{"name": "weather", "parameters": {"in": "Rome"}}<|eot_id|>', "Ahoy<|eot_id|>"]
    ]
    talk = [HI, CALL, Message("tool", "sunny", name="weather"), AHOY]
    first, second = render(tiny_tokenizer, QWEN, talk, TOOLS)
    assert trained([first, second]) == [
        ['<tool_call>{"name": "weather", "arguments": {"in": "Rome"}}</tool_call><|im_end|>'],
        [" Ahoy <|im_end|>"],
    ]
    assert '"parameters"' in first[0][0]
    assert "<tool_response>sunny</tool_response>" in second[0][0]


def test_a_message_of_weight_0_is_context(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    [spans] = render(tiny_tokenizer, LLAMA, [HI, Message("assistant", "Ahoy", weight=0), BYE, FAIR])
    assert trained([spans]) == [["Fair winds<|eot_id|>"]]
    assert "Ahoy<|eot_id|>" in spans[0][0]


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (DEEPSEEK, TALK, "message 2, assistant: the chat template renders the messages before it differently"),
        (GEMMA, [Message("system", "Pirate."), *TALK], "refuses it: 'System role not supported'"),
        (GEMMA, [HI, CALL, Message("tool", "sunny"), AHOY], "the base's chat template ignores tool calls"),
        (LLAMA, [HI, Message("assistant", "Ahoy", "greet")], "message 2, assistant: .* its content and reasoning"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", TALK, "marks no end of a turn"),
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", TALK, "message 2, .* rewrites its content"),
        (
            "{% for m in messages %}{{ loop.length }}{{ m.content }}</s>{% endfor %}",
            TALK,
            "renders the messages before it differently",
        ),
        ("{% for m in messages %}{{ m.role }}</s>{% endfor %}", TALK, "marks no end|rewrites its content"),
        ("{{ 1 / 0 }}", TALK, "refuses it"),
        ("{% if", TALK, "refuses it"),
    ],
)
def test_a_template_that_would_give_a_wrong_mask_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, template: str, messages: list[Message], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        render(tiny_tokenizer, template, messages)


def test_tools_without_a_place_in_the_template_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for template in (LLAMA, GEMMA, MISTRAL):
        with pytest.raises(DataError, match="the base's chat template ignores tools"):
            render(tiny_tokenizer, template, TALK, TOOLS)
    assert render(tiny_tokenizer, QWEN, TALK, TOOLS)


def test_tool_messages_are_refused_where_a_template_writes_any_role(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="the base's chat template ignores tool messages"):
        render(tiny_tokenizer, LLAMA, [HI, CALL, Message("tool", "sunny", name="weather"), AHOY])


def test_a_system_message_that_the_template_forbids_or_drops_is_refused_with_a_way_out(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    drops = "{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}" + ASK
    for template, said in ((GEMMA, "refuses it: 'System role"), (drops, "drops the system message")):
        with pytest.raises(DataError, match=said) as caught:
            render(tiny_tokenizer, template, [Message("system", "Pirate."), *TALK])
        assert caught.value.hint_for("python").endswith("DataConfig(fold_system=True)")
        assert "--fold-system" in caught.value.hint_for("cli")


def test_what_a_template_writes_around_contents(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    for template, begin, answer, places_system in (
        (LLAMA, "<|im_start|>", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>", True),
        (QWEN, "", "<|im_end|>\n<|im_start|>assistant", True),
        (GEMMA, "", "<end_of_turn>\n<start_of_turn>model", False),
        (MISTRAL, "<|im_start|>", "[/INST]", True),
        ("{{ 1 / 0 }}", "", "", True),
    ):
        other.chat_template = template
        found = marks(other)
        assert (found.begin, found.answer, found.places_system) == (begin, answer, places_system)


def test_a_system_message_goes_into_the_users() -> None:
    assert fold_system([Message("system", "Pirate."), *TALK]) == [Message("user", "Pirate.\n\nHi"), *TALK[1:]]
    late = [HI, AHOY, Message("system", "Pirate."), Message("system", " "), Message("system", "Brief."), BYE, FAIR]
    assert fold_system(late) == [HI, AHOY, Message("user", "Pirate.\n\nBrief.\n\nBye"), FAIR]
    assert fold_system(TALK) == TALK


def test_the_placeholder_may_appear_in_a_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    spans = render(
        tiny_tokenizer, LLAMA, [Message("user", PLACEHOLDER), Message("assistant", f"{PLACEHOLDER}{PLACEHOLDER}")]
    )
    assert trained(spans) == [[f"{PLACEHOLDER}{PLACEHOLDER}<|eot_id|>"]]


def test_the_end_of_a_turn(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    for template, mark in ((GEMMA, "<end_of_turn>"), (QWEN, "<|im_end|>"), (None, "")):
        other.chat_template = template
        assert marks(other).end == mark
