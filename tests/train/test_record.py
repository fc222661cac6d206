import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradeck.errors import DataError
from loradeck.train.record import Completion, Conversation, Message, Text, parse

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}


def line(**keys: object) -> bytes:
    return msgspec.json.encode(keys)


def test_the_three_forms() -> None:
    assert parse(line(text="Once")) == Text("Once")
    assert parse(line(prompt="Hi", completion="Ahoy", id=7, source=["x"])) == Completion("Hi", "Ahoy")
    assert parse(line(messages=[USER, REPLY], prompt="Hi", tools=None)) == Conversation(
        [Message("user", "Hi"), Message("assistant", "Ahoy")]
    )


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse(b"\xef\xbb\xbf" + line(text="Once")) == Text("Once")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b"{}", "$: none of messages, prompt and completion, or text; its keys are none"),
        (line(instruction="x", output="y"), "its keys are 'instruction', 'output'"),
        (line(prompt="x"), "$: none of"),
        (line(text="x", prompt="y", completion="z"), "$: more than one of"),
        (b"[1]", "$: Expected `object`, got `array`"),
        (b'{"text": "x"', "$: Input data was truncated"),
        (b'{"text": "x"} {"text": "y"}', "trailing characters"),
        (b'{"text": "\xff"}', "byte 10 is not UTF-8"),
        ('{"text": "x"}'.encode("utf-16"), "byte 0 is not UTF-8"),
        (b'{"text": "\\ud800"}', "$: "),
        (b'{"a":' * 100_000, "nested too deeply"),
        (line(text=1), "$.text: Expected `str`, got `int`"),
        (line(text=" \n"), "$.text: is empty"),
        (line(prompt="", completion="x"), "$.prompt: is empty"),
        (line(prompt="x", completion=""), "$.completion: is empty"),
        (line(prompt=[USER], completion="x"), "$.prompt: Expected `str`, got `array`"),
        (line(messages=[]), "$.messages: has no assistant turn to learn"),
        (line(messages=[USER]), "$.messages: has no assistant turn to learn"),
        (line(messages=[REPLY]), "$.messages[0].role: is assistant, with nothing to answer"),
        (line(messages=[USER, {"role": "assistant", "content": ""}]), "$.messages[1].content: is empty"),
        (line(messages=[USER, {"role": "assistant"}]), "$.messages[1]: Object missing required field `content`"),
        (line(messages=[USER, {"role": "robot", "content": "x"}]), "$.messages[1].role: is 'robot', not one of system"),
        (
            line(messages=[USER, {**REPLY, "tool_calls": [{}]}]),
            "$.messages[1].tool_calls: Expected `null`, got `array`",
        ),
        (line(messages=[USER, REPLY], tools=[{}]), "$.tools: Expected `null`, got `array`"),
    ],
)
def test_what_is_wrong_is_said_with_its_path(bad: bytes, said: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(bad)
    assert said in caught.value.message
    assert len(caught.value.message) < 300


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]) | json_values, "content": json_values}
)
objects = st.fixed_dictionaries(
    {},
    optional={
        "text": json_values,
        "prompt": json_values,
        "completion": json_values,
        "messages": st.lists(turns) | json_values,
    },
)


@given(st.binary(max_size=64) | (objects | json_values).map(msgspec.json.encode))
def test_any_line_is_a_record_or_a_data_error(content: bytes) -> None:
    refused, record = "", None
    try:
        record = parse(content)
    except DataError as error:
        refused = error.message
    assert refused.isprintable()
    assert refused or isinstance(record, Conversation | Completion | Text)
