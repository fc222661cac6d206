"""Templates as they are in use, each cut down to the habit that makes a mask go wrong."""

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loradeck.dataset.message import Message
from loradeck.dataset.record import Conversation, Span
from loradeck.dataset.template import ANSWER, end_of_turn, sequences
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


def made(
    tokenizer: PreTrainedTokenizerFast, template: str, messages: list[Message], tools: Any = None
) -> list[list[Span]]:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return list(sequences(other, Conversation(messages, tools)))


def learned(made: list[list[Span]]) -> list[list[str]]:
    return [[text for text, is_learned in segments if is_learned] for segments in made]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA, ["Ahoy<|eot_id|>", "Fair winds<|eot_id|>"]),
        (GEMMA, ["Ahoy<end_of_turn>", "Fair winds<end_of_turn>"]),
        (MISTRAL, ["Ahoy<|im_end|>", "Fair winds<|im_end|>"]),
        ("{% for m in messages %}" + TURN + "{% endfor %}" + ASK, [" Ahoy <|im_end|>", "Fair winds<|im_end|>"]),
    ],
)
def test_answers_and_their_ends_are_learned_though_no_template_marks_them(
    tiny_tokenizer: PreTrainedTokenizerFast, template: str, expected: list[str]
) -> None:
    [segments] = made(tiny_tokenizer, template, TALK)
    assert learned([segments]) == [expected]
    assert all(text not in segment for text in ("Ahoy", "Fair") for segment, is_learned in segments if not is_learned)


def test_a_mark_for_the_assistants_text_changes_nothing(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    marked = TURN.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    plain, with_marks = ("{% for m in messages %}" + turn + "{% endfor %}" + ASK for turn in (TURN, marked))
    assert made(tiny_tokenizer, with_marks, TALK) == made(tiny_tokenizer, plain, TALK)


def test_the_empty_thought_that_a_template_puts_in_is_read_only(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for answer in ("Ahoy", "<think>\n\n</think>\n\nAhoy", "<think></think>Ahoy"):
        [[(read, _), (answered, is_learned)]] = made(tiny_tokenizer, QWEN, [HI, Message("assistant", answer)])
        assert read.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert (answered, is_learned) == ("Ahoy<|im_end|>", True)


def test_an_empty_thought_in_the_file_is_read_only_too(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    segments = made(tiny_tokenizer, LLAMA, [HI, Message("assistant", "<think>\n</think>\nAhoy")])
    assert learned(segments) == [["Ahoy<|eot_id|>"]]


def test_a_template_that_forgets_thoughts_gets_a_sequence_for_each_answer(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    thoughtful = [
        HI,
        Message("assistant", "Ahoy", "greet"),
        BYE,
        Message("assistant", "<think>\npart\n</think>\n\nBye"),
    ]
    first, second = made(tiny_tokenizer, QWEN, thoughtful)
    assert learned([first, second]) == [
        ["<think>\ngreet\n</think>\n\nAhoy<|im_end|>"],
        ["<think>\npart\n</think>\n\nBye<|im_end|>"],
    ]
    assert second[0] == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nAhoy<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        False,
    )


def test_a_system_turn_that_moves_gets_a_sequence_for_each_answer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    segments = made(tiny_tokenizer, MISTRAL, [Message("system", "Pirate."), *TALK])
    assert learned(segments) == [["Ahoy<|im_end|>"], ["Fair winds<|im_end|>"]]
    assert segments[1][0][0] == "<|im_start|>[INST] Hi [/INST] Ahoy<|im_end|>[INST] Pirate.\n\nBye [/INST] "


def test_calls_are_learned_and_what_tools_say_is_read(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [HI, CALL, Message("tool", "sunny", name="weather"), AHOY]
    assert learned(made(tiny_tokenizer, LLAMA, talk, TOOLS)) == [
        ['{"name": "weather", "parameters": {"in": "Rome"}}<|eot_id|>', "Ahoy<|eot_id|>"]
    ]
    first, second = made(tiny_tokenizer, QWEN, talk, TOOLS)
    assert learned([first, second]) == [
        ['<tool_call>{"name": "weather", "arguments": {"in": "Rome"}}</tool_call><|im_end|>'],
        [" Ahoy <|im_end|>"],
    ]
    assert '"parameters"' in first[0][0]
    assert "<tool_response>sunny</tool_response>" in second[0][0]


def test_a_turn_of_weight_0_is_read(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    [segments] = made(tiny_tokenizer, LLAMA, [HI, Message("assistant", "Ahoy", weight=0), BYE, FAIR])
    assert learned([segments]) == [["Fair winds<|eot_id|>"]]
    assert "Ahoy<|eot_id|>" in segments[0][0]


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (DEEPSEEK, TALK, "turn 2, assistant: the chat template does not render what comes before it as the beginning"),
        (GEMMA, [Message("system", "Pirate."), *TALK], "refuses it: 'System role not supported'"),
        (GEMMA, [HI, CALL, Message("tool", "sunny"), AHOY], "turn 2, assistant: .* rewrites its tool calls"),
        (LLAMA, [HI, Message("assistant", "Ahoy", "greet")], "turn 2, assistant: .* its content and reasoning"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", TALK, "marks no end of a turn"),
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", TALK, "turn 2, .* rewrites its content"),
        ("{% for m in messages %}{{ loop.length }}{{ m.content }}</s>{% endfor %}", TALK, "as the beginning"),
        ("{% for m in messages %}{{ m.role }}</s>{% endfor %}", TALK, "marks no end|rewrites its content"),
        ("{{ 1 / 0 }}", TALK, "refuses it"),
        ("{% if", TALK, "refuses it"),
    ],
)
def test_a_template_that_would_give_a_wrong_mask_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, template: str, messages: list[Message], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        made(tiny_tokenizer, template, messages)


def test_what_stands_in_for_an_answer_may_be_in_a_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    segments = made(tiny_tokenizer, LLAMA, [Message("user", ANSWER), Message("assistant", f"{ANSWER}{ANSWER}")])
    assert learned(segments) == [[f"{ANSWER}{ANSWER}<|eot_id|>"]]


def test_the_end_of_a_turn(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    for template, mark in ((GEMMA, "<end_of_turn>"), (QWEN, "<|im_end|>"), (None, "")):
        other.chat_template = template
        assert end_of_turn(other) == mark
