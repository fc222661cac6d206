import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loradeck.dataset.label import forms_of
from loradeck.dataset.message import Message
from loradeck.dataset.record import FORMS, Completion, Conversation, PlainText, PreferencePair, TokenIds, parse
from loradeck.errors import DataError

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}
BYE, FAIR = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Fair winds"}
ASKED, ANSWERED = Message("user", "Hi"), Message("assistant", "Ahoy")
READ = Message("assistant", "Ahoy", weight=0)
WEATHER = {"name": "weather", "parameters": {}}
TOOL = {"type": "function", "function": WEATHER}
CALLED = {"type": "function", "function": {"name": "weather", "arguments": {"in": "Rome"}}}


def line(**keys: object) -> bytes:
    return msgspec.json.encode(keys)


def test_text_and_completion() -> None:
    assert parse(line(text="Once")) == PlainText("Once")
    assert parse(line(prompt="Hi", completion="Ahoy", id=7, source=["x"])) == Completion("Hi", "Ahoy")


def test_messages() -> None:
    assert parse(line(messages=[USER, REPLY], tools=None)) == Conversation([ASKED, ANSWERED])
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert parse(line(messages=[{"role": "user", "content": parts}, REPLY])) == Conversation([ASKED, ANSWERED])
    thoughtful = Conversation([ASKED, Message("assistant", "Ahoy", "greet")])
    for key in ("reasoning_content", "thinking"):
        assert parse(line(messages=[USER, REPLY | {key: "greet"}])) == thoughtful


def test_tool_calls_and_their_results() -> None:
    function = {"name": "weather", "arguments": {"in": "Rome"}}
    as_openai = {"id": "7", "type": "function", "function": function | {"arguments": '{"in": "Rome"}'}}
    says = {"role": "tool", "tool_call_id": "7", "name": "weather", "content": "sunny"}
    for calls, call in (([as_openai], CALLED | {"id": "7"}), ([{"function": function}], CALLED), ([function], CALLED)):
        turns = [USER, {"role": "assistant", "content": None, "tool_calls": calls}, says, REPLY]
        for tools in ([TOOL], [WEATHER], msgspec.json.encode([WEATHER]).decode()):
            assert parse(line(messages=turns, tools=tools)) == Conversation(
                [
                    ASKED,
                    Message("assistant", "", tool_calls=[call]),
                    Message("tool", "sunny", name="weather", tool_call_id="7"),
                    ANSWERED,
                ],
                [TOOL],
            )


def test_a_message_of_weight_0_is_not_trained_on() -> None:
    record = parse(line(messages=[USER, REPLY | {"weight": 0}, BYE | {"weight": 0}, FAIR | {"weight": 1}]))
    assert isinstance(record, Conversation)
    assert [message.trained for message in record.messages] == [False, False, False, True]


def test_prompt_and_completion_may_be_messages() -> None:
    expected = Conversation([ASKED, READ, Message("user", "Bye"), Message("assistant", "Fair winds")])
    assert parse(line(prompt=[USER, REPLY, BYE], completion=[FAIR])) == expected
    assert parse(line(prompt=[USER, REPLY, BYE], completion="Fair winds")) == expected
    assert parse(line(prompt="Hi", completion=REPLY)) == Conversation([ASKED, ANSWERED])


def test_alpaca() -> None:
    assert parse(line(instruction="Hi", output="Ahoy", input="")) == Conversation([ASKED, ANSWERED])
    long = parse(
        line(instruction="Add", input="2 2", output="4", system="Reckon.", history=[["Hi", "Ahoy"]], text="all of it")
    )
    assert long == Conversation(
        [Message("system", "Reckon."), ASKED, ANSWERED, Message("user", "Add\n2 2"), Message("assistant", "4")]
    )
    assert long.form == "alpaca"


def test_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"in": "Rome"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Ahoy"},
    ]
    record = parse(line(conversations=turns, system="Be brief.", tools=msgspec.json.encode([WEATHER]).decode()))
    assert record == Conversation(
        [
            Message("system", "Be brief."),
            ASKED,
            Message("assistant", "", tool_calls=[CALLED]),
            Message("tool", "sunny"),
            ANSWERED,
        ],
        [TOOL],
    )
    assert record.form == "sharegpt"
    assert parse(line(conversations=[USER, REPLY])) == Conversation([ASKED, ANSWERED])


def test_tokens() -> None:
    for key in ("tokens", "input_ids"):
        assert parse(line(**{key: [5, 6]}, labels=[-100, 6], attention_mask=[1, 1])) == TokenIds([5, 6], [-100, 6])


def test_preference_pairs_as_openai_has_them() -> None:
    polite = {"role": "assistant", "content": "Good day"}
    turns = PreferencePair(Conversation([ASKED, ANSWERED]), Conversation([ASKED, Message("assistant", "Good day")]))
    asked = {"messages": [USER], "tools": None, "parallel_tool_calls": True}
    assert parse(line(input=asked, preferred_output=[REPLY], non_preferred_output=[polite])) == turns
    for fields, what in (
        ({"input": {"messages": []}}, "$.input.messages: "),
        ({"input": {}}, "$.input: "),
        ({"preferred_output": [{"role": "assistant"}]}, "$.preferred_output[0]"),
        ({"non_preferred_output": [REPLY]}, "$.non_preferred_output: equals"),
    ):
        record = {"input": asked, "preferred_output": [REPLY], "non_preferred_output": [polite], **fields}
        with pytest.raises(DataError, match=re.escape(what)):
            parse(line(**record))


def test_preference_pairs() -> None:
    strings = PreferencePair(Completion("Hi", "Ahoy"), Completion("Hi", "Good day"))
    assert parse(line(prompt="Hi", chosen="Ahoy", rejected="Good day")) == strings
    polite = {"role": "assistant", "content": "Good day"}
    turns = PreferencePair(Conversation([ASKED, ANSWERED]), Conversation([ASKED, Message("assistant", "Good day")]))
    for keys in (
        {"prompt": [USER], "chosen": [REPLY], "rejected": [polite]},
        {"prompt": "Hi", "chosen": REPLY, "rejected": polite},
        {"chosen": [USER, REPLY], "rejected": [USER, polite]},
        {"prompt": "Hi", "chosen": [USER, REPLY], "rejected": [USER, polite], "messages": [USER, REPLY]},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Ahoy"},
            "rejected": {"from": "gpt", "value": "Good day"},
        },
    ):
        assert parse(line(**keys)) == turns


def test_the_messages_that_both_sides_share_are_the_prompt() -> None:
    record = parse(line(chosen=[USER, REPLY, BYE, FAIR], rejected=[USER, REPLY, BYE, FAIR | {"content": "Off"}]))
    assert isinstance(record, PreferencePair)
    assert isinstance(record.chosen, Conversation)
    assert record.chosen.messages[:3] == [ASKED, READ, Message("user", "Bye")]
    assert record.chosen.messages[3].trained


def test_a_record_is_of_the_first_form_whose_keys_it_has() -> None:
    assert parse(line(text="x", prompt="y", completion="z", messages=None)).form == "prompt and completion"
    assert parse(line(prompt="y", messages=[USER, REPLY])).form == "messages"


def test_a_byte_order_mark_is_ignored() -> None:
    assert parse(b"\xef\xbb\xbf" + line(text="Once")) == PlainText("Once")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (
            b"{}",
            "$: unknown form; expected messages, prompt and completion, text, alpaca, sharegpt, tokens and labels, or chosen",
        ),
        (line(question="x", answer="y"), "the keys are 'question', 'answer'"),
        (line(prompt="x", completion=None), "the keys are 'prompt'"),
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
        (line(prompt=[USER], completion=""), "$.completion: is empty"),
        (line(prompt=[USER], completion=[BYE]), "$.completion: has no assistant message to train on"),
        (line(prompt="x", completion="y", label=False), "$.label: KTO is not supported"),
        (line(prompt=["x"], completion="y"), "$.prompt[0]: Expected `object`, got `str`"),
        (line(messages=[]), "$.messages: has no assistant message to train on"),
        (line(messages=[USER]), "$.messages: has no assistant message to train on"),
        (line(messages=[USER, REPLY | {"weight": 0}]), "$.messages: has no assistant message to train on"),
        (line(messages=[REPLY]), "$.messages[0].role: a conversation cannot begin with the assistant"),
        (line(messages=[USER, {"role": "assistant", "content": ""}]), "$.messages[1].content: is empty"),
        (line(messages=[USER, {"role": "assistant"}]), "$.messages[1].content: is empty"),
        (line(messages=[{"content": "x"}]), "$.messages[0].role: is missing; expected one of system"),
        (
            line(messages=[USER, {"role": "robot", "content": "x"}]),
            "$.messages[1].role: unknown role 'robot'; expected one of system",
        ),
        (
            line(messages=[{"role": "human", "content": "x"}]),
            "$.messages[0].role: unknown role 'human'; expected one of system, user",
        ),
        (line(messages=[USER | {"from": "human"}]), "$.messages[0]: has both role and from"),
        (line(messages=[{"role": "user", "content": 1}]), "$.messages[0].content: Expected `str | array | null`"),
        (
            line(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "$.messages[0].content[0].type: unsupported type 'image_url'; only text",
        ),
        (line(messages=[USER, REPLY | {"train": False}]), "$.messages: has no assistant message to train on"),
        (line(messages=[USER, REPLY | {"weight": 0.5}]), "$.messages[1].weight: must be 0 or 1, not 0.5"),
        (line(messages=[USER | {"weight": 1}, REPLY]), "$.messages[0].weight: is 1, but only assistant messages"),
        (line(messages=[USER, REPLY | {"tool_calls": [{}]}]), "$.messages[1].tool_calls[0]: names no function"),
        (line(messages=[USER | {"tool_calls": [CALLED]}, REPLY]), "$.messages[0].tool_calls: only the assistant calls"),
        (
            line(messages=[USER, REPLY | {"tool_calls": [{"name": "f", "arguments": "in Rome"}]}]),
            "$.messages[1].tool_calls[0].arguments: invalid JSON",
        ),
        (line(messages=[USER, REPLY], tools="weather"), "$.tools: invalid JSON"),
        (line(messages=[USER, REPLY], tools=[1]), "$.tools[0]: Expected `object`, got `int`"),
        (
            line(conversations=[{"from": "robot", "value": "x"}]),
            "$.conversations[0].from: unknown role 'robot'; expected one of system, h",
        ),
        (
            line(conversations=[{"from": "human", "value": "x"}, {"from": "function_call", "value": "f()"}]),
            "$.conversations[1].value: invalid JSON",
        ),
        (line(conversations=[{"from": "human", "value": "x"}, {"from": "gpt"}]), "$.conversations[1].value: is empty"),
        (line(instruction="x", output=" "), "$.output: is empty"),
        (line(instruction="", output="y"), "$.instruction: is empty"),
        (line(instruction="x", output="y", history=[["x"]]), "$.history[0]: Expected `array` of length 2"),
        (line(tokens=[1, 2], labels=[1]), "$.labels: has 1 items, but tokens has 2"),
        (line(input_ids=[1, 2], labels=[-100, 3]), "$.labels[1]: must be -100 or input_ids[1], which is 2; not 3"),
        (line(tokens=[1, 2], labels=[1, -100]), "$.labels: nothing to train on"),
        (line(tokens=[-1], labels=[-1]), "$.tokens[0]: Expected `int` >= 0"),
        (line(tokens=["B-PER"], labels=[1]), "$.tokens[0]: Expected `int`, got `str`"),
        (line(chosen="x", rejected="y"), "$.prompt: is missing"),
        (line(prompt="x", chosen="y", rejected="y"), "$.rejected: equals chosen"),
        (line(chosen=[USER, REPLY], rejected=[USER, REPLY]), "$.rejected: equals chosen"),
        (line(prompt="x", chosen="y", rejected=""), "$.rejected: is empty"),
        (line(prompt="Bye", chosen=[USER, REPLY], rejected=[USER, FAIR]), "$.prompt: chosen and rejected are whole"),
        (
            line(chosen=[USER, REPLY], rejected=[USER, REPLY, BYE, FAIR]),
            "$.chosen: must continue with an assistant message",
        ),
        (line(chosen=[USER, REPLY], rejected=[BYE, FAIR]), "$.chosen: must continue with an assistant message"),
    ],
)
def test_an_error_names_the_path(bad: bytes, said: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(bad)
    assert said in caught.value.message
    assert len(caught.value.message) < 300


# A record of each form, with two answers where it can hold them.
RECORDS: dict[str, dict[str, object]] = {
    "messages": {"messages": [USER, REPLY, BYE, FAIR]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ahoy"}]},
    "alpaca": {"instruction": "Hi", "output": "Ahoy"},
    "prompt and completion": {"prompt": "Hi", "completion": "Ahoy"},
    "completion in messages": {"prompt": [USER], "completion": [REPLY]},
    "preference pairs": {"prompt": "Hi", "chosen": "Ahoy", "rejected": "Hello"},
    "preference pairs in messages": {"chosen": [USER, REPLY], "rejected": [USER, REPLY | {"content": "Hello"}]},
    "text": {"text": "Once"},
    "tokens": {"tokens": [1, 2], "labels": [1, 2]},
}
WITH_TURNS = [form for form in RECORDS if form not in ("text", "tokens")]
WEIGHTS = (
    "weight",
    "loss",
    "train",
    "training",
    "train_on_turn",
    "trainable",
    "loss_weight",
    "compute_loss",
    "is_trainable",
)


def refusal(**keys: object) -> str:
    with pytest.raises(DataError) as caught:
        parse(line(**keys))
    return caught.value.message


@pytest.mark.parametrize("key", WEIGHTS)
@pytest.mark.parametrize("value", [False, 0, 0.0, "false"])
def test_an_answer_marked_as_not_to_learn_is_context(key: str, value: object) -> None:
    expected = [False, False, False, True]
    record = parse(line(messages=[USER, REPLY | {key: value}, BYE | {key: value}, FAIR | {key: True}]))
    assert isinstance(record, Conversation)
    assert [message.trained for message in record.messages] == expected
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[each["role"]], "value": each["content"]} for each in (USER, REPLY, BYE, FAIR)]
    turns[1][key] = value  # type: ignore[assignment]
    record = parse(line(conversations=turns))
    assert isinstance(record, Conversation)
    assert [message.trained for message in record.messages] == expected


@pytest.mark.parametrize("form", RECORDS)
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        *((key, value, f"$.{key}: says not to train on this record") for key in WEIGHTS for value in (False, 0)),
        ("weight", 0.5, "$.weight: must be 0 or 1, not 0.5"),
        ("loss_mask", [0, 1], "$.loss_mask: is not supported"),
        ("train_detail", [{"begin_offset": 0}], "$.train_detail: is not supported"),
        ("completion_mask", [0, 1], "$.completion_mask: is not supported"),
        ("assistant_masks", [0, 1], "$.assistant_masks: is not supported"),
        ("label", False, "$.label: KTO is not supported"),
        ("label", "False", "$.label: KTO is not supported"),
        ("kto_tag", False, "$.kto_tag: KTO is not supported"),
        ("desirable", False, "$.desirable: KTO is not supported"),
        ("image_path", "a.png", "$.image_path: is not text"),
        ("images", ["a.png"], "$.images: is not text"),
        ("audio", {"path": "a.wav"}, "$.audio: is not text"),
        ("videos", ["a.mp4"], "$.videos: is not text"),
    ],
)
def test_a_record_that_is_not_to_be_learned_is_refused_in_every_form(
    form: str, key: str, value: object, said: str
) -> None:
    assert said in refusal(**RECORDS[form], **{key: value})


@pytest.mark.parametrize("form", RECORDS)
def test_what_says_that_a_record_is_good_changes_nothing(form: str) -> None:
    marks = {"weight": 1, "loss": True, "label": True, "kto_tag": "true", "images": [], "audio": None, "loss_mask": ""}
    record = parse(line(**RECORDS[form], **marks))
    assert (record, record.unused) == (parse(line(**RECORDS[form])), ())


def test_a_class_of_a_text_is_no_judgement() -> None:
    assert parse(line(text="Once", label=0)).unused == ("label",)
    assert "KTO" in refusal(prompt="Hi", completion="Ahoy", label=0)


@pytest.mark.parametrize("key", ["loss_mask", "train_detail", "images"])
def test_a_message_with_marks_that_are_not_supported_is_refused(key: str) -> None:
    assert f"$.messages[1].{key}: is not" in refusal(messages=[USER, REPLY | {key: [1]}])
    assert f"$.chosen[1].{key}: is not" in refusal(chosen=[USER, REPLY | {key: [1]}], rejected=[USER, FAIR])


def test_marks_that_contradict_each_other_are_refused() -> None:
    assert "$.messages[1]: weight and loss contradict" in refusal(messages=[USER, REPLY | {"weight": 1, "loss": False}])


@pytest.mark.parametrize("form", WITH_TURNS)
@pytest.mark.parametrize(
    "system", ["Be a pirate.", [{"type": "text", "text": "Be a pirate."}], [{"text": "Be a "}, {"text": "pirate."}]]
)
def test_a_system_prompt_beside_the_turns_is_read_in_every_form(form: str, system: object) -> None:
    record = parse(line(**RECORDS[form], system=system))
    sides = (record.chosen, record.rejected) if isinstance(record, PreferencePair) else (record,)
    for side in sides:
        assert isinstance(side, Conversation)
        assert side.messages[:2] == [Message("system", "Be a pirate."), ASKED]
    assert record.unused == ()
    assert parse(line(**RECORDS[form], system=" ")) == parse(line(**RECORDS[form]))


def test_two_system_prompts_are_refused_unless_they_are_the_same() -> None:
    turns = [{"role": "system", "content": "Be brief."}, USER, REPLY]
    assert parse(line(messages=turns, system="Be brief.")) == parse(line(messages=turns))
    assert "$.system: differs from the system message" in refusal(messages=turns, system="Be a pirate.")


@pytest.mark.parametrize("form", WITH_TURNS)
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_are_read_in_every_form(form: str, key: str) -> None:
    record = parse(line(**RECORDS[form], **{key: [WEATHER]}))
    sides = (record.chosen, record.rejected) if isinstance(record, PreferencePair) else (record,)
    assert [side.tools for side in sides if isinstance(side, Conversation)] == [[TOOL]] * len(sides)
    assert "$.functions: stands beside tools" in refusal(**RECORDS[form], tools=[WEATHER], functions=[WEATHER])


def test_calls_as_openai_used_to_write_them() -> None:
    call = {"name": "weather", "arguments": '{"in": "Rome"}'}
    says = {"role": "function", "name": "weather", "content": "sunny"}
    for content in (None, "", "Let me see."):
        record = parse(
            line(messages=[USER, {"role": "assistant", "content": content, "function_call": call}, says, FAIR])
        )
        assert isinstance(record, Conversation)
        assert record.messages[1:3] == [
            Message("assistant", content or "", tool_calls=[CALLED]),
            Message("tool", "sunny", name="weather"),
        ]
    assert parse(line(messages=[USER, REPLY | {"function_call": None}])) == Conversation([ASKED, ANSWERED])
    both = REPLY | {"function_call": call, "tool_calls": [CALLED]}
    assert "has both tool_calls and function_call" in refusal(messages=[USER, both])


@pytest.mark.parametrize("empty", ["", None, [], " \n\t"])
def test_an_empty_user_message_is_refused_in_every_form(empty: object) -> None:
    nothing = {"role": "user", "content": empty}
    for keys in (
        {"messages": [nothing, REPLY]},
        {"messages": [USER, REPLY, nothing, FAIR]},
        {"conversations": [{"from": "human", "value": empty}, {"from": "gpt", "value": "Ahoy"}]},
        {"prompt": [nothing], "completion": [REPLY]},
        {"prompt": [nothing], "chosen": [REPLY], "rejected": [FAIR]},
        {"chosen": [nothing, REPLY], "rejected": [nothing, FAIR]},
    ):
        assert "is empty" in refusal(**keys)


def test_an_empty_turn_of_a_history_is_refused() -> None:
    assert refusal(instruction="Hi", output="Ahoy", history=[["x", " "]]) == "$.history[0][1]: is empty"
    assert refusal(instruction="Hi", output="Ahoy", history=[["x", "y"], ["", "y"]]) == "$.history[1][0]: is empty"


@pytest.mark.parametrize("form", RECORDS)
def test_other_keys_are_named_as_passed_over(form: str) -> None:
    others = {"documents": ["x"], "context": "y", "suffix": "z", "id": 0, "note": None, "tags": []}
    assert parse(line(**RECORDS[form], **others)).unused == ("documents", "context", "suffix", "id")


def test_other_keys_of_messages_are_named_too() -> None:
    turns = [USER | {"id": 1}, REPLY | {"reasoning": "greet", "weight": 1}]
    assert parse(line(messages=turns, input="x")).unused == ("input", "messages[].id", "messages[].reasoning")
    assert parse(line(prompt="Hi", completion=turns[1])).unused == ("completion.reasoning",)
    pair = parse(line(chosen=turns, rejected=[turns[0], FAIR]))
    assert pair.unused == ("chosen[].id", "chosen[].reasoning")


def test_developer_is_system() -> None:
    turns = [{"role": "developer", "content": "Be brief."}, USER, REPLY]
    assert parse(line(messages=turns)) == Conversation([Message("system", "Be brief."), ASKED, ANSWERED])


@pytest.mark.parametrize("name", ["gpt", "GPT", "chatgpt", "bing", "bard", "model", "bot", "assistant"])
def test_the_assistant_has_many_names_in_sharegpt(name: str) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": name, "value": "Ahoy"}]
    assert parse(line(conversations=turns)) == Conversation([ASKED, ANSWERED])


def test_padding_would_be_read_as_text() -> None:
    assert "$.attention_mask: has zeros" in refusal(input_ids=[0, 5], labels=[-100, 5], attention_mask=[0, 1])


def test_a_cell_of_a_table_holds_a_list_as_json() -> None:
    turns = msgspec.json.encode([USER, REPLY]).decode()
    talk = Conversation([ASKED, ANSWERED])
    assert parse(line(messages=turns, labels="positive")) == talk
    assert parse(line(dialog=f" {turns}"), {"messages": "dialog"}) == talk
    assert parse(line(conversations=turns)) == talk
    assert parse(line(tokens="[5, 6]", labels="[-100, 6]")) == TokenIds([5, 6], [-100, 6])
    history = parse(line(instruction="Bye", output="Fair winds", history='[["Hi", "Ahoy"]]'))
    assert isinstance(history, Conversation)
    assert history.messages[:2] == [ASKED, ANSWERED]
    assert parse(line(text="[1, 2")) == PlainText("[1, 2")
    assert refusal(messages="[,").startswith("$.messages: invalid JSON: ")


def test_columns_of_other_names() -> None:
    columns = {"prompt": "Question", "completion": "Answer"}
    record = parse(line(Question="Hi", Answer="Ahoy", prompt="old", id=7), columns)
    assert record == Completion("Hi", "Ahoy")
    assert record.unused == ("id", "prompt")
    for keys, said in (
        ({"Question": "Hi", "Answer": " "}, "$.Answer: is empty"),
        ({"Question": 1, "Answer": "Ahoy"}, "$.Question: Expected"),
        (
            {"Query": "Hi", "Answer": "Ahoy"},
            "$: has no 'Question', which columns names; the keys are 'Query', 'Answer'",
        ),
    ):
        with pytest.raises(DataError) as caught:
            parse(line(**keys), columns)
        assert caught.value.message.startswith(said)


@pytest.mark.parametrize(
    ("keys", "flag"),
    [
        (["question", "answer"], "--columns prompt=question,completion=answer"),
        (["id", "QUESTION", "ANSWER"], "--columns prompt=QUESTION,completion=ANSWER"),
        (["instruction", "response"], "--columns prompt=instruction,completion=response"),
        (["input", "output"], "--columns prompt=input,completion=output"),
        (["query", "response"], "--columns prompt=query,completion=response"),
        (["Problem", "Solution"], "--columns prompt=Problem,completion=Solution"),
        (["prompt", "response"], "--columns completion=response"),
        (["Instruction", "Input", "Output"], "--columns instruction=Instruction,input=Input,output=Output"),
        (["instruction", "context", "response", "category"], "--columns input=context,output=response"),
        (
            ["system_prompt", "question", "response"],
            "--columns prompt=question,completion=response,system=system_prompt",
        ),
        (["system", "question", "chosen", "rejected"], "--columns prompt=question"),
        (["Messages"], "--columns messages=Messages"),
        (["ticket", "subject", "body"], "--columns prompt=COLUMN,completion=COLUMN"),
    ],
)
def test_columns_are_suggested_in_the_words_of_the_door(keys: list[str], flag: str) -> None:
    record: dict[str, object] = {key: [USER, REPLY] if key == "Messages" else f"a {key}" for key in keys}
    with pytest.raises(DataError) as caught:
        parse(line(**record))
    assert all(f"'{key}'" in caught.value.message for key in keys) or "chosen" in keys
    assert caught.value.cli == f'{flag}, or in a run file columns = "{flag.removeprefix("--columns ")}"'
    columns = dict(pair.split("=") for pair in flag.removeprefix("--columns ").split(","))
    assert (
        caught.value.python
        == f"DataConfig(columns={msgspec.json.format(msgspec.json.encode(columns), indent=0).decode()})"
    )
    if "COLUMN" not in flag:
        assert parse(line(**record), columns)


def test_spans_without_a_tokenizer() -> None:
    for record, expected in (
        (PlainText("Once"), [("Once", True)]),
        (Completion("Hi", "Ahoy"), [("Hi", False), ("Ahoy", True)]),
        (Conversation([ASKED, ANSWERED]), [("user: Hi", False), ("assistant: Ahoy", True)]),
        (TokenIds([5, 6, 7], [-100, 6, 7]), [("5", False), ("6 7", True)]),
        (
            PreferencePair(Completion("Hi", "Ahoy"), Completion("Hi", "Good day")),
            [("Hi", False), ("Ahoy", True), ("Good day", True)],
        ),
    ):
        assert record.spans() == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]) | json_values, "content": json_values},
    optional={
        "tool_calls": json_values | st.lists(st.fixed_dictionaries({"name": json_values, "arguments": json_values})),
        "weight": json_values,
        "from": json_values,
        "value": json_values,
    },
)
optional_keys = sorted({key for _, needed in FORMS for key in needed} | {"tools", "system", "history", "input"})
objects = st.fixed_dictionaries(
    {}, optional={key: st.lists(turns, max_size=3) | turns | json_values for key in optional_keys}
)


@pytest.mark.slow
@given(st.binary(max_size=64) | (objects | json_values).map(msgspec.json.encode))
def test_any_line_is_a_record_or_a_data_error(content: bytes) -> None:
    refused, record = "", None
    try:
        record = parse(content)
    except DataError as error:
        refused = error.message
    assert refused.isprintable()
    assert refused or isinstance(record, Conversation | Completion | PlainText | TokenIds | PreferencePair)


def test_the_page_on_data_shows_each_form() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")

    def shown(part: str, task: str) -> list[str]:
        blocks = re.findall(r"```json\n(.*?)```", part, re.DOTALL)
        lines = [line.encode() for block in blocks for line in block.splitlines()]
        return list(dict.fromkeys(parse(line, {}, forms_of(task)).form for line in lines))

    generate, labels = page.split("\n### With `--task classify`")
    texts, words = labels.split("**Tokens and tags**")
    known = "preference pairs, tokens, messages, sharegpt, prompt and completion, alpaca, text"
    assert ", ".join(shown(generate, "generate")) == known
    assert shown(texts, "classify") == ["text and label"]
    assert shown(words, "tokens") == ["tokens and tags"]


@pytest.mark.parametrize("half", ["\\ud83d", "\\ud83d and more", "\\uDE00 and more", "x \\ud83d\\n"])
def test_half_of_a_surrogate_pair_is_named(half: str) -> None:
    with pytest.raises(DataError, match=r"\\u\w{4} is half of a surrogate pair"):
        parse(f'{{"text": "{half}"}}'.encode())


def test_a_list_in_a_cell_that_is_not_json_has_a_hint() -> None:
    cell = "[{'role': 'user', 'content': 'Hi'}]"  # as pandas and datasets write it
    with pytest.raises(DataError, match="invalid JSON") as caught:
        parse(msgspec.json.encode({"messages": cell}))
    assert "as JSON lines" in caught.value.hint


def test_a_pair_without_a_prompt_is_asked_for_one_alone() -> None:
    with pytest.raises(DataError, match="prompt: is missing") as caught:
        parse(b'{"chosen": "a", "rejected": "b"}')
    assert caught.value.cli.startswith("--columns prompt=COLUMN, or")
