"""An adapter's own tokenizer and chat template, as tools write them, and what is wrong with files of strangers."""

import gc
import json
import logging
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.own_tokenizers import PLAIN, SHOUTING, with_eos, with_other_ids
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loradeck import tokenizer_files
from loradeck.base import adapter_tokenizer
from loradeck.base.adapter_tokenizer import AdapterTokenizers
from loradeck.base.tokenizer_difference import differences
from loradeck.errors import AdapterError
from loradeck.lora.manifest import stamp
from loradeck.tokenizer_files import TokenizerFiles

CONFIG = LlamaConfig(vocab_size=260)
TALK = [{"role": "user", "content": "hé"}]
Own = Callable[..., PreTrainedTokenizerBase]


def files_of(folder: Path) -> TokenizerFiles:
    return TokenizerFiles.of(folder, stamp(folder))


@pytest.fixture
def tokenizers(tiny_tokenizer: PreTrainedTokenizerFast) -> AdapterTokenizers:
    return AdapterTokenizers(tiny_tokenizer, CONFIG)


@pytest.fixture
def own(tokenizers: AdapterTokenizers) -> Own:
    """Return the tokenizer of a blend of adapters in these folders."""
    return lambda *folders: tokenizers.of(map(files_of, folders))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "poet"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return folder


def prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.apply_chat_template(TALK, return_dict=False)  # type: ignore[return-value]


# ---- what is shipped is used


def test_a_folder_without_any_has_the_bases(own: Own, folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert own() is tiny_tokenizer
    assert own(folder) is tiny_tokenizer


def test_a_copy_of_the_bases_is_the_bases(own: Own, folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Training leaves its truncation and padding in the file."""
    tiny_tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(definition))
    assert own(folder) is tiny_tokenizer


def test_a_whole_tokenizer_is_what_transformers_loads(
    own: Own, folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    shipped = with_other_ids(tiny_tokenizer, eos_token="<|endoftext|>", chat_template=SHOUTING)
    shipped.save_pretrained(folder)
    expected = AutoTokenizer.from_pretrained(folder)
    tokenizer = own(folder)
    assert tokenizer("hé")["input_ids"] == expected("hé")["input_ids"] != tiny_tokenizer("hé")["input_ids"]
    assert prompt(tokenizer) == prompt(expected) != prompt(tiny_tokenizer)
    assert tokenizer.eos_token_id == expected.eos_token_id == 0


def test_a_template_alone_has_the_bases_vocabulary(
    own: Own, folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (folder / "chat_template.jinja").write_text(PLAIN)
    tokenizer = own(folder)
    assert tokenizer.decode(prompt(tokenizer)) == "hé\n"
    assert tokenizer.backend_tokenizer is tiny_tokenizer.backend_tokenizer
    assert tiny_tokenizer.chat_template != PLAIN


def test_older_tools_write_the_template_into_the_configuration(
    own: Own, folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": PLAIN}))
    assert own(folder).decode(prompt(own(folder))) == "hé\n"


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_files_of_transformers_4(own: Own, folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    shipped = with_other_ids(tiny_tokenizer)
    (folder / "tokenizer.json").write_text(shipped.backend_tokenizer.to_str())
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    specials = {
        str(id): {"content": str(token), **flags, "special": True} for id, token in shipped.added_tokens_decoder.items()
    }
    config = {
        "add_bos_token": False,
        "added_tokens_decoder": specials,
        "bos_token": None,
        "chat_template": SHOUTING,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "extra_special_tokens": {},
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": name,
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>", **flags}}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 2}))
    tokenizer = own(folder)
    assert tokenizer("hé")["input_ids"] == shipped("hé")["input_ids"]
    assert tokenizer.decode(prompt(tokenizer)) == "[user] hé!<|endoftext|>[answer] "
    assert (tokenizer.eos_token_id, tokenizer.bos_token) == (0, None)


def test_what_a_folder_has_not_is_the_bases(own: Own, folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    shipped = with_other_ids(tiny_tokenizer, eos_token="<|endoftext|>")
    shipped.save_pretrained(folder)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / name).unlink()
    tokenizer = own(folder)  # the vocabulary alone
    assert tokenizer("hé")["input_ids"] == shipped("hé")["input_ids"]
    assert (tokenizer.eos_token, tokenizer.chat_template) == (tiny_tokenizer.eos_token, tiny_tokenizer.chat_template)
    shipped.save_pretrained(folder)
    for name in ("chat_template.jinja", "tokenizer.json"):
        (folder / name).unlink()
    tokenizer = own(folder)  # the special tokens alone
    assert tokenizer("hé")["input_ids"] == tiny_tokenizer("hé")["input_ids"]
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (0, tiny_tokenizer.chat_template)


def test_the_same_content_is_one_tokenizer(own: Own, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder, template in zip(folders, (SHOUTING, SHOUTING, PLAIN), strict=True):
        with_other_ids(tiny_tokenizer, chat_template=template).save_pretrained(folder)
    first, second, third = map(own, folders)
    assert first is second is not third
    assert third.backend_tokenizer is first.backend_tokenizer
    assert (first.chat_template, third.chat_template) == (SHOUTING, PLAIN)


def test_a_bounded_number_is_kept(own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_tokenizer, "KNOWN_CONTENTS", 2)
    folders = [tmp_path / str(number) for number in range(3)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "chat_template.jinja").write_text(f"{number}")
    first, second, third = (weakref.ref(own(folder)) for folder in folders)
    gc.collect()
    assert first() is None
    assert own(folders[1]) is second() is not None
    assert own(folders[2]) is third() is not None
    assert own(folders[0]).chat_template == "0"


def test_a_blend_has_the_one_that_its_adapters_agree_on(
    own: Own, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [tmp_path / name for name in ("one", "two", "other", "none")]
    for folder, template in zip(folders, (PLAIN, PLAIN, SHOUTING, None), strict=True):
        folder.mkdir()
        if template:
            (folder / "chat_template.jinja").write_text(template)
    one, two, other, none = folders
    with caplog.at_level(logging.WARNING):
        assert own(one, two).chat_template == PLAIN
        assert not caplog.records
        assert own(one, other) is own(two, none) is own(none, none) is tiny_tokenizer
    assert [record.getMessage() for record in caplog.records] == [
        "a blend of adapters with different tokenizers or chat templates has those of the base"
    ]


def test_tokens_beyond_the_bases_are_taken_where_the_embedding_has_rows_for_them(
    folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    shipped = with_eos(tiny_tokenizer, "<|stop|>")
    shipped.save_pretrained(folder)
    number = shipped.convert_tokens_to_ids("<|stop|>")
    wide = AdapterTokenizers(tiny_tokenizer, LlamaConfig(vocab_size=number + 1)).of([files_of(folder)])
    assert wide.eos_token_id == number
    with pytest.raises(
        AdapterError, match=rf"poet has the token '<\|stop\|>' with the id {number}, and .* {number} rows"
    ):
        AdapterTokenizers(tiny_tokenizer, LlamaConfig(vocab_size=number)).of([files_of(folder)])


# ---- files of strangers


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def own_code(folder: Path) -> None:
    write("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["tok.Tok", null]}, "tokenizer_class": "Tok"}')(
        folder
    )
    write("tok.py", "raise SystemExit")(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write("tokenizer.json", '{"model"'), r"poet/tokenizer.json is not a JSON object"),
        (write("tokenizer.json", '{"model": {"type": "BPE"}}'), r"cannot load the tokenizer of .*poet"),
        (write("tokenizer_config.json", "[]"), r"poet/tokenizer_config.json is not a JSON object"),
        (write("tokenizer_config.json", "[" * 10**6), r"poet/tokenizer_config.json is not a JSON object"),
        (write("chat_template.jinja", b"\xff"), r"poet/chat_template.jinja is not text in UTF-8"),
        (write("chat_template.jinja", "\n{% for %}"), r"poet/chat_template.jinja, line 2: "),
        (write("tokenizer_config.json", '{"chat_template": "{{"}'), r"poet/tokenizer_config.json, line 1: "),
        (own_code, r"poet needs its own code, which loradeck never runs"),
    ],
)
def test_what_cannot_be_used_is_one_error(
    own: Own, folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(folder)
    for _ in range(2):
        with pytest.raises(AdapterError, match=message):
            own(folder)


def test_what_cannot_be_used_is_not_loaded_again_and_again(
    own: Own, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer.json").write_text('{"model": {}}')
    monkeypatch.setattr("loradeck.disk.SETTLED", -(10**9))
    with pytest.raises(AdapterError) as first:
        own(folder)
    monkeypatch.setattr(adapter_tokenizer, "pretrained_tokenizer", None)
    with pytest.raises(AdapterError) as second:
        own(folder)
    assert (second.value.message, second.value.hint) == (first.value.message, first.value.hint)
    monkeypatch.undo()
    (folder / "tokenizer.json").unlink()
    assert own(folder) is own()


@pytest.mark.parametrize("limit", ["MAX_BYTES", "MAX_TEMPLATE"])
def test_large_files_are_refused_before_they_are_read(
    own: Own, folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    (folder / "chat_template.jinja").write_text("x" * 100)
    monkeypatch.setattr(tokenizer_files, limit, 99)
    monkeypatch.setattr(tokenizer_files, "read_start", None)
    with pytest.raises(AdapterError, match=r"poet.* has 100 bytes, more than the limit of 99"):
        own(folder)


def test_a_folder_that_changes_after_the_adapter_was_found_is_refused(
    tokenizers: AdapterTokenizers, folder: Path
) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(PLAIN)
    found = files_of(folder)
    path.write_text(SHOUTING)
    with pytest.raises(AdapterError, match=r"chat_template.jinja has changed"):
        tokenizers.of([found])
    path.unlink()
    with pytest.raises(AdapterError, match=r"chat_template.jinja cannot be read"):
        tokenizers.of([found])


def test_a_template_cannot_leave_its_sandbox(own: Own, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(Exception, match="unsafe"):
        prompt(own(folder))


# ---- in words


def test_differences_are_named(own: Own, folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert differences(own(folder), tiny_tokenizer) == {}
    with_other_ids(tiny_tokenizer, eos_token="<|endoftext|>", chat_template=PLAIN).save_pretrained(folder)
    assert differences(own(folder), tiny_tokenizer) == {
        "vocabulary": "256 with other ids: Ń, ł, Ł and 253 others",
        "special tokens": "eos is <|endoftext|>, not <|im_end|>",
        "chat template": "another one",
    }
