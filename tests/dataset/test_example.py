import copy

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from loradeck.base import text
from loradeck.base.load import Base
from loradeck.dataset.example import Example, Preference, examples, stop_tokens
from loradeck.dataset.message import Message
from loradeck.dataset.record import UNSUPERVISED, Completion, Conversation, PlainText, PreferencePair, Record, TokenIds
from loradeck.errors import DataError

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
# As Qwen 3: the last answer begins with an empty thinking block, those before it do not.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
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
        (PlainText("Once upon a time"), "Once upon a time<|im_end|>"),
        (TALK, "Ahoy!<|im_end|>  Fair winds \n<|im_end|>"),
    ],
)
def test_exactly_the_answers_and_their_ends_are_trained_on(
    tiny_tokenizer: PreTrainedTokenizerFast, record: Record, expected: str
) -> None:
    encoded = Example.of(record, tiny_tokenizer, 1024)
    assert trained(tiny_tokenizer, encoded) == expected
    assert examples(record, tiny_tokenizer, 1024) == [encoded]


@example(prompt="\ufffc", completion=" \ufffc\ufffc")  # what stands in for an answer when the template is probed
@given(prompt=st.text().filter(str.strip), completion=st.text(min_size=1).filter(str.strip))
def test_all_of_a_completion_is_trained_on(
    tiny_tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str
) -> None:
    encoded = Example.of(Completion(prompt, completion), tiny_tokenizer, 10_000)
    assert trained(tiny_tokenizer, encoded) == completion + "<|im_end|>"


def test_the_prompt_is_tokenized_as_for_generation(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    example = Example.of(Completion("Hi", "Ahoy"), tiny_tokenizer, 1024)
    prompt = text.encode(tiny_tokenizer, "Hi")
    assert example.tokens[: len(prompt)] == prompt
    assert example.labels[: len(prompt)] == [UNSUPERVISED] * len(prompt)
    assert example.supervised == len(example.tokens) - len(prompt) == len("Ahoy") + 1


def test_without_a_chat_template_a_prompt_is_continued(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = with_template(tiny_tokenizer, None)
    example = Example.of(Completion("Q: Hi\nA:", " Ahoy"), plain, 1024)
    assert plain.decode(example.tokens) == "Q: Hi\nA: Ahoy<|im_end|>"
    assert trained(plain, example) == " Ahoy<|im_end|>"
    with pytest.raises(DataError, match="no chat template for conversations"):
        Example.of(TALK, plain, 1024)


def test_a_text_begins_as_the_tokenizer_begins_texts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = with_template(tiny_tokenizer, None)
    first = ("<|endoftext|>", plain.convert_tokens_to_ids("<|endoftext|>"))
    plain.backend_tokenizer.post_processor = TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    for record in (PlainText("ab"), Completion("a", "b")):
        example = Example.of(record, plain, 64)
        assert plain.decode(example.tokens) == "<|endoftext|>ab<|im_end|>"
        assert trained(plain, example) == ("ab<|im_end|>" if isinstance(record, PlainText) else "b<|im_end|>")


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
    assert trained(plain, example) == "forty<|im_end|>"
    assert example.tokens[: -example.supervised] == text.encode(plain, "The answer is ")


@pytest.mark.real
def test_masks_on_a_real_tokenizer(smollm2: Base) -> None:
    for record, expected in [
        (Completion("Hi", "Ahoy, matey!"), "Ahoy, matey!<|im_end|>"),
        (TALK, "Ahoy!<|im_end|>  Fair winds \n<|im_end|>"),
    ]:
        assert trained(smollm2.tokenizer, Example.of(record, smollm2.tokenizer, 1024)) == expected


def test_what_the_template_writes_before_an_answer_is_not_trained_on(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    thinking = with_template(tiny_tokenizer, THINKING)
    example = Example.of(Completion("Hi", " think "), thinking, 1024)
    assert "<think>\n\n</think>\n\nthink<|im_end|>" in thinking.decode(example.tokens)
    assert trained(thinking, example) == "think<|im_end|>"


def test_a_conversation_that_a_template_rewrites_makes_several_examples(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    thinking = with_template(tiny_tokenizer, THINKING)
    encoded = [each for each in examples(TALK, thinking, 1024) if isinstance(each, Example)]
    assert [trained(thinking, each) for each in encoded] == ["Ahoy!<|im_end|>", "Fair winds<|im_end|>"]
    assert "\nAhoy!<|im_end|>" in thinking.decode(encoded[1].tokens)
    with pytest.raises(DataError, match="makes 2 sequences"):
        Example.of(TALK, thinking, 1024)


def test_truncation_is_marked_and_never_leaves_nothing(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = Example.of(Completion("Hi", "Ahoy"), tiny_tokenizer, 1024)
    length = len(whole.tokens)
    assert not whole.truncated
    assert Example.of(Completion("Hi", "Ahoy"), tiny_tokenizer, length) == whole
    cut = Example.of(Completion("Hi", "Ahoy"), tiny_tokenizer, length - 2)
    assert cut == Example(whole.tokens[:-2], whole.labels[:-2], truncated=True)
    with pytest.raises(DataError, match="nothing to train on within max_length"):
        Example.of(Completion("Hi", "Ahoy"), tiny_tokenizer, length - 5)
    assert Example.of(TALK, tiny_tokenizer, 60).truncated


@given(st.text(min_size=1, max_size=40).filter(str.strip), st.integers(2, 20))
def test_a_long_text_is_split_into_chunks_and_each_token_is_trained_on_once(
    tiny_tokenizer: PreTrainedTokenizerFast, content: str, max_length: int
) -> None:
    chunks = [each for each in examples(PlainText(content), tiny_tokenizer, max_length) if isinstance(each, Example)]
    assert all(2 <= len(chunk.tokens) <= max_length and not chunk.truncated for chunk in chunks)
    assert chunks[0].tokens[:1] + [t for chunk in chunks for t in chunk.tokens[1:]] == (
        tiny_tokenizer(content)["input_ids"] + [tiny_tokenizer.eos_token_id]
    )
    assert all(chunk.supervised == len(chunk.tokens) - 1 for chunk in chunks)
    assert all(chunk.labels[0] == UNSUPERVISED for chunk in chunks[1:])


def test_token_ids_are_not_changed(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert Example.of(TokenIds([5, 6, 2], [-100, 6, 2]), tiny_tokenizer, 8) == Example([5, 6, 2], [-100, 6, 2])
    assert Example.of(TokenIds([5, 6, 2], [-100, 6, 2]), tiny_tokenizer, 2) == Example(
        [5, 6], [-100, 6], truncated=True
    )
    size = len(tiny_tokenizer)
    with pytest.raises(DataError, match=f"token {size} is outside the base's vocabulary of {size}"):
        Example.of(TokenIds([5, size], [-100, size]), tiny_tokenizer, 8)


@pytest.mark.parametrize("template", ["the tokenizer's", None, THINKING])
def test_both_sides_of_a_pair_begin_with_the_same_prompt(
    tiny_tokenizer: PreTrainedTokenizerFast, template: str | None
) -> None:
    tokenizer = tiny_tokenizer if template == "the tokenizer's" else with_template(tiny_tokenizer, template)
    pair = Preference.of(PreferencePair(Completion("Hi", "Ahoy"), Completion("Hi", "Good day")), tokenizer, 1024)
    prompts = [
        [token for token, label in zip(each.tokens, each.labels, strict=True) if label == UNSUPERVISED]
        for each in (pair.chosen, pair.rejected)
    ]
    assert prompts[0] == prompts[1] == pair.chosen.tokens[: len(prompts[0])]
    assert trained(tokenizer, pair.chosen) == "Ahoy<|im_end|>"
    assert trained(tokenizer, pair.rejected) == "Good day<|im_end|>"
    assert pair.supervised == len("Ahoy") + len("Good day") + 2
    assert not pair.truncated
    assert Preference.of(
        PreferencePair(Completion("Hi", "Ahoy"), Completion("Hi", "Good day")), tokenizer, len(pair.rejected.tokens) - 1
    ).truncated


def test_an_example_in_spans(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert Example.of(Completion("Hi", "Ahoy"), tiny_tokenizer, 64).spans(tiny_tokenizer) == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("Ahoy<|im_end|>", True),
    ]


def test_the_stop_tokens_are_the_ends_of_text_and_of_a_turn(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    start, end = (tiny_tokenizer.convert_tokens_to_ids(each) for each in ("<|endoftext|>", "<|im_end|>"))
    assert stop_tokens(tiny_tokenizer) == {end}
    other = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    assert stop_tokens(with_template(tiny_tokenizer, other)) == {start, end}
    assert stop_tokens(with_template(tiny_tokenizer, "{{ 1 / 0 }}")) == {end}
