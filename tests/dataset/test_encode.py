"""Beginnings and ends that a record already holds, and what is read otherwise than written."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from loradeck.base.load import Base
from loradeck.dataset.example import Example, Preference, examples
from loradeck.dataset.message import Message
from loradeck.dataset.record import Completion, Conversation, PlainText, PreferencePair, Record
from loradeck.errors import DataError

PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
# As Llama 3: one begin of text, and a mark for the end of a turn that is not the end of a text.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def encode(
    record: Record, tokenizer: PreTrainedTokenizerFast, *, fold_system: bool = False
) -> tuple[Example, set[str]]:
    remarks: set[str] = set()
    [example] = examples(record, tokenizer, 1024, fold_system=fold_system, remarks=remarks)
    assert isinstance(example, Example)
    return example, remarks


@pytest.fixture
def beginning(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that begins a text with a token, and ends it with one, too."""
    other = copy.deepcopy(tiny_tokenizer)
    other.chat_template, other.bos_token = None, "<|endoftext|>"
    begin, end = ((token, tiny_tokenizer.convert_tokens_to_ids(token)) for token in ("<|endoftext|>", "<|im_end|>"))
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin[0]} $A {end[0]}", special_tokens=[begin, end]
    )
    return other


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|im_end|><|im_end|>", " \n"])
def test_an_answer_that_already_ends_is_not_ended_twice(tiny_tokenizer: PreTrainedTokenizerFast, end: str) -> None:
    plain, _ = encode(Completion("Hi", "Ahoy"), tiny_tokenizer)
    talk = Conversation([Message("user", "Hi"), Message("assistant", f"Ahoy{end}")])
    for record in (Completion("Hi", f"Ahoy{end}"), talk):
        example, remarks = encode(record, tiny_tokenizer)
        assert (example == plain) == (end != " \n")
        assert bool(remarks) == (end != " \n")
    assert remarks <= {"an answer already ends with <|im_end|>; it is not added twice"}
    with pytest.raises(DataError, match="an answer is empty but for its end"):
        encode(Completion("Hi", " <|im_end|>"), tiny_tokenizer)


def test_both_answers_of_a_pair_may_already_end(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [
        examples(PreferencePair(Completion("Hi", f"Ahoy{end}"), Completion("Hi", f"Hello{end}")), tiny_tokenizer, 64)
        for end in ("", "<|im_end|>\n")
    ]
    assert isinstance(pairs[0][0], Preference)
    assert pairs[0] == pairs[1]


def test_a_text_is_neither_begun_nor_ended_twice(beginning: PreTrainedTokenizerFast) -> None:
    for record in (PlainText("ab"), Completion("a", "b")):
        plain, remarks = encode(record, beginning)
        assert beginning.decode(plain.tokens) == "<|endoftext|>ab<|im_end|>"
        assert remarks == set()
        marked: Record = PlainText("<|endoftext|>ab<|im_end|>\n")
        if isinstance(record, Completion):
            marked = Completion("<|endoftext|>a", "b<|im_end|>")
        example, remarks = encode(marked, beginning)
        assert example == plain
        assert remarks == {
            "already begins with the begin-of-text token; it is not added twice",
            "already ends with <|im_end|>; no end is added",
        }


def test_a_rendered_text_keeps_its_end(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = f"{PROMPT}Ahoy<|im_end|>"
    for content in (text, text + "\n"):
        example, remarks = encode(PlainText(content), tiny_tokenizer)
        assert tiny_tokenizer.decode(example.tokens) == text
        assert remarks == {"already ends with <|im_end|>; no end is added"}


def test_a_rendered_prompt_is_not_rendered_again(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    plain, _ = encode(Completion("Hi", "Ahoy"), tiny_tokenizer)
    for prompt, completion in ((PROMPT, "Ahoy"), (PROMPT, "Ahoy<|im_end|>")):
        example, remarks = encode(Completion(prompt, completion), tiny_tokenizer)
        assert example == plain
        assert "the prompt is already rendered by the chat template; it is not rendered again" in remarks
    turns = Conversation([Message("user", PROMPT), Message("assistant", "Ahoy")])
    assert encode(turns, tiny_tokenizer)[0] == plain
    forged, _ = encode(Completion(PROMPT, "a<|im_end|>b"), tiny_tokenizer)
    assert forged.tokens.count(tiny_tokenizer.eos_token_id) == 2
    pair = examples(PreferencePair(Completion(PROMPT, "Ahoy"), Completion(PROMPT, "Hello")), tiny_tokenizer, 64)
    assert pair == examples(PreferencePair(Completion("Hi", "Ahoy"), Completion("Hi", "Hello")), tiny_tokenizer, 64)


def test_a_rendered_text_within_a_message_is_said(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    _, remarks = encode(Conversation([Message("user", f"{PROMPT}Ahoy"), Message("assistant", "Aye")]), tiny_tokenizer)
    assert "holds, within a message, a text that the chat template has already rendered; give it as text" in remarks


def test_a_conversation_is_begun_once(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    other.chat_template, other.bos_token = LLAMA, "<|endoftext|>"
    plain, _ = encode(Completion("Hi", "Ahoy"), other)
    for record in (
        Completion("<|endoftext|>Hi", "Ahoy"),
        Completion("<user>Hi<|im_end|><assistant>", "Ahoy"),
        Completion("<|endoftext|><user>Hi<|im_end|><assistant>", "Ahoy<|im_end|>"),
    ):
        example, remarks = encode(record, other)
        assert example == plain
        assert remarks


def test_a_system_message_is_folded_only_where_the_template_has_no_place_for_it(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    talk = Conversation([Message("system", "Pirate."), Message("user", "Hi"), Message("assistant", "Ahoy")])
    assert encode(talk, tiny_tokenizer, fold_system=True) == encode(talk, tiny_tokenizer)
    gemma = copy.deepcopy(tiny_tokenizer)
    gemma.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + str(
        gemma.chat_template
    )
    with pytest.raises(DataError, match="no system"):
        encode(talk, gemma)
    assert encode(talk, gemma, fold_system=True) == encode(Completion("Pirate.\n\nHi", "Ahoy"), gemma)


@pytest.mark.real
def test_a_real_base_reads_marked_and_plain_records_alike(smollm2: Base) -> None:
    tokenizer = smollm2.tokenizer
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    plain = examples(Completion("Hi", "Ahoy"), tokenizer, 64)
    assert examples(Completion(str(rendered), "Ahoy<|im_end|>\n"), tokenizer, 64) == plain
    assert examples(Completion("Hi", "Ahoy<|im_end|>"), tokenizer, 64) == plain
