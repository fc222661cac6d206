import copy
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from loradeck.base import text
from loradeck.base.load import Base
from loradeck.errors import DataError
from loradeck.train import dataset
from loradeck.train.dataset import read_dataset
from loradeck.train.example import UNSUPERVISED, Example
from loradeck.train.record import Completion, Conversation, Message, Record, Text

TALK = Conversation(
    [
        Message("system", "Be a pirate."),
        Message("user", "Hi"),
        Message("assistant", "Ahoy!"),
        Message("user", "Bye"),
        Message("assistant", "  Fair winds \n"),
        Message("user", "Still there?"),
    ]
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learned(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    assert len(example.tokens) == len(example.labels)
    assert all(label in (token, UNSUPERVISED) for token, label in zip(example.tokens, example.labels, strict=True))
    return tokenizer.decode([label for label in example.labels if label != UNSUPERVISED])


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (Completion("Hi", "Ahoy, matey!"), "Ahoy, matey!<|im_end|>"),
        (Completion("Hi", "\n two\n\nlines \n"), "\n two\n\nlines \n<|im_end|>"),
        (Completion("Grüße 🏴", "Ahoy ☠️ é"), "Ahoy ☠️ é<|im_end|>"),
        (Text("Once upon a time"), "Once upon a time<|im_end|>"),
        (TALK, "Ahoy!<|im_end|>  Fair winds \n<|im_end|>"),
    ],
)
def test_exactly_the_answers_and_their_ends_are_learned(
    tiny_tokenizer: PreTrainedTokenizerFast, record: Record, expected: str
) -> None:
    assert learned(tiny_tokenizer, Example.of(record, tiny_tokenizer, 1024)) == expected


@example(prompt="\ufffc", completion=" \ufffc\ufffc")  # what stands in for an answer when the template is probed
@given(prompt=st.text().filter(str.strip), completion=st.text(min_size=1).filter(str.strip))
def test_any_completion_is_learned_whole(tiny_tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> None:
    made = Example.of(Completion(prompt, completion), tiny_tokenizer, 10_000)
    assert learned(tiny_tokenizer, made) == completion + "<|im_end|>"


def test_what_is_read_is_what_generation_reads(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    example = Example.of(Completion("Hi", "Ahoy"), tiny_tokenizer, 1024)
    prompt = text.encode(tiny_tokenizer, "Hi")
    assert example.tokens[: len(prompt)] == prompt
    assert example.labels[: len(prompt)] == [UNSUPERVISED] * len(prompt)
    assert example.supervised == len(example.tokens) - len(prompt) == len("Ahoy") + 1


def test_without_a_chat_template_a_prompt_is_continued(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = with_template(tiny_tokenizer, None)
    example = Example.of(Completion("Q: Hi\nA:", " Ahoy"), plain, 1024)
    assert plain.decode(example.tokens) == "Q: Hi\nA: Ahoy<|im_end|>"
    assert learned(plain, example) == " Ahoy<|im_end|>"
    with pytest.raises(DataError, match="no chat template"):
        Example.of(TALK, plain, 1024)


def test_a_text_begins_as_the_tokenizer_begins_texts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = with_template(tiny_tokenizer, None)
    first = ("<|endoftext|>", plain.convert_tokens_to_ids("<|endoftext|>"))
    plain.backend_tokenizer.post_processor = TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    for record in (Text("ab"), Completion("a", "b")):
        example = Example.of(record, plain, 64)
        assert plain.decode(example.tokens) == "<|endoftext|>ab<|im_end|>"
        assert learned(plain, example) == ("ab<|im_end|>" if isinstance(record, Text) else "b<|im_end|>")


def test_a_first_words_mark_is_not_put_on_an_answer() -> None:
    """As SentencePiece marks them: alone, "b" would be "▁b", and read as " b"."""
    pieces = Tokenizer(models.BPE(vocab={"</s>": 0, "▁": 1, "a": 2, "b": 3}, merges=[]))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="</s>")
    example = Example.of(Completion("a", "b"), tokenizer, 64)
    assert (example.tokens, example.supervised) == ([1, 2, 3, 0], 2)


@pytest.mark.real
def test_a_merge_across_the_border_is_not_made(smollm2: Base) -> None:
    plain = with_template(smollm2.tokenizer, None)
    example = Example.of(Completion("The answer is ", "forty"), plain, 1024)  # " forty" would be one token
    assert learned(plain, example) == "forty<|im_end|>"
    assert example.tokens[: -example.supervised] == text.encode(plain, "The answer is ")


@pytest.mark.real
def test_masks_on_a_real_tokenizer(smollm2: Base) -> None:
    for record, expected in [
        (Completion("Hi", "Ahoy, matey!"), "Ahoy, matey!<|im_end|>"),
        (TALK, "Ahoy!<|im_end|>  Fair winds \n<|im_end|>"),
    ]:
        assert learned(smollm2.tokenizer, Example.of(record, smollm2.tokenizer, 1024)) == expected


def test_what_the_template_puts_before_an_answer_is_not_learned(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    thinking = with_template(tiny_tokenizer, THINKING)
    example = Example.of(Completion("Hi", " think "), thinking, 1024)
    assert "<think>\n\n</think>\n\nthink<|im_end|>" in thinking.decode(example.tokens)
    assert learned(thinking, example) == "think<|im_end|>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (THINKING, r"\$.messages\[4\]: the chat template does not render a conversation as a prefix of itself"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "marks no end of a turn"),
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", r"\$.messages\[2\].content: .* rewrites it"),
        ("{% for m in messages %}{{ loop.length }}{{ m.content }}</s>{% endfor %}", "prefix of itself"),
        ("{{ raise_exception('roles must alternate') }}", "refuses them: 'roles must alternate'"),
        ("{{ 1 / 0 }}", "refuses them"),
        ("{% if", "refuses them"),
    ],
)
def test_a_template_that_would_give_a_wrong_mask_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, template: str, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        Example.of(TALK, with_template(tiny_tokenizer, template), 1024)


def test_truncation_is_marked_and_never_leaves_nothing(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = Example.of(Completion("Hi", "Ahoy"), tiny_tokenizer, 1024)
    length = len(whole.tokens)
    assert not whole.truncated
    assert Example.of(Completion("Hi", "Ahoy"), tiny_tokenizer, length) == whole
    cut = Example.of(Completion("Hi", "Ahoy"), tiny_tokenizer, length - 2)
    assert cut == Example(whole.tokens[:-2], whole.labels[:-2], truncated=True)
    with pytest.raises(DataError, match="nothing to learn is left within max_length"):
        Example.of(Completion("Hi", "Ahoy"), tiny_tokenizer, length - 5)
    assert Example.of(Text("Ahoy"), tiny_tokenizer, 4).truncated  # its end of text did not fit
    assert Example.of(TALK, tiny_tokenizer, 60).truncated


def test_a_file_is_read_in_order(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "two.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"prompt": "b", "completion": "c"}')
    examples = read_dataset(path, tiny_tokenizer, 64)
    assert [learned(tiny_tokenizer, example) for example in examples] == ["a<|im_end|>", "c<|im_end|>"]


def test_every_bad_line_is_in_one_error(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": 1}\n\n{\n' + b'{"prompt": "too long for it", "completion": "x"}\n')
    with pytest.raises(DataError) as caught:
        read_dataset(str(path), tiny_tokenizer, 20)
    assert caught.value.message == f"{path} has 3 lines that cannot be trained on"
    assert caught.value.problems == (
        "bad.jsonl:2: $.text: Expected `str`, got `int`",
        "bad.jsonl:4: $: Input data was truncated",
        "bad.jsonl:5: nothing to learn is left within max_length, 20 tokens",
    )
    assert caught.value.mend


def test_a_file_that_is_none(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data.jsonl"
    for place in (path, tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_dataset(place, tiny_tokenizer, 64)
    path.write_bytes(b"\n \n")
    with pytest.raises(DataError, match="is empty"):
        read_dataset(path, tiny_tokenizer, 64)
    path.write_bytes(b'{"text": "' + b"a" * 100 + b'"}')
    monkeypatch.setattr(dataset, "LINE_BYTES", 50)
    with pytest.raises(DataError, match=r"data.jsonl:1: has more than 50 bytes"):
        read_dataset(path, tiny_tokenizer, 64)
    monkeypatch.setattr(dataset, "FILE_BYTES", 60)
    with pytest.raises(DataError, match="more than 60"):
        read_dataset(path, tiny_tokenizer, 64)


keys = st.sampled_from(["text", "prompt", "completion", "messages", "role", "content", "id"])
values = st.text(max_size=6) | st.none() | st.sampled_from(["user", "assistant", "system"])
turns = st.lists(st.dictionaries(keys, values, max_size=3) | st.fixed_dictionaries({"role": values, "content": values}))
lines = st.dictionaries(keys, values | turns, max_size=3).map(msgspec.json.encode) | st.binary(max_size=20)


@given(st.lists(lines, max_size=4).map(b"\n".join))
def test_any_file_is_examples_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content)
    refused, examples = "", []
    try:
        examples = read_dataset(path, tiny_tokenizer, 64)
    except DataError as error:
        refused = error.mend
    assert refused or all(example.supervised for example in examples)
