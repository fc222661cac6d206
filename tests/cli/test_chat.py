from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.own_tokenizers import PLAIN
from transformers import PreTrainedTokenizerFast

from loradeck.cli import chat as verb
from loradeck.cli.chat import Chat
from loradeck.cli.chat_backends import Local


def test_a_conversation_changes_adapters(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    typed = "Hi\n/adapter poet\nAnd now?\n/blend poet=0.7 pirate=0.3\n/base\n\n/help\n/reset\n/quit\nunread"
    flags = ["-a", adapters / "pirate", "-a", adapters / "poet", "--max-new-tokens", 4]
    ran = run("chat", tiny_folder, *flags, typed=typed)
    assert ran.code == 0, ran.err
    assert "tiny with pirate, poet; /help lists the commands" in ran.out
    assert "pirate > " in ran.out
    for speaker in ("poet", "poet=0.7 pirate=0.3", "base"):
        assert f"{speaker}, switched in " in ran.out
    assert verb.HELP in ran.out
    assert "conversation reset" in ran.out
    assert ran.out.endswith("base > ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adapter nobody", "unknown adapter 'nobody'\nLoaded: poet.\n"),
        ("/adapter", "unknown command"),
        ("/jump", "unknown command"),
        ("/blend", "unknown command"),
        ("/blend poet", "invalid blend"),
        ("/blend poet=much", "invalid blend"),
        ("/blend poet=nan", "nan"),
        ("x" * 400, "context"),
    ],
)
def test_an_error_ends_a_turn_and_not_the_conversation(
    run: Callable, tiny_folder: Path, adapters: Path, line: str, message: str
) -> None:
    ran = run("chat", tiny_folder, "-a", adapters / "poet", "--max-new-tokens", 2, typed=f"{line}\n/base\n")
    assert ran.code == 0
    assert message in ran.out
    assert "base, switched in" in ran.out


def test_an_adapter_with_a_template_chats_on_a_base_without(run: Callable, tiny_folder: Path, adapters: Path) -> None:
    (tiny_folder / "chat_template.jinja").unlink()
    (adapters / "poet" / "chat_template.jinja").write_text(PLAIN)
    ran = run("chat", tiny_folder, "-a", adapters / "poet", "--max-new-tokens", 2, typed="Hi\n/base\nHi\n")
    assert ran.code == 0, ran.err
    assert ran.out.count("there is no chat template") == 1


def test_history_is_kept_and_ctrl_c_ends_an_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    turns: list[list[dict[str, str]]] = []

    def stream(base: object, bank: object, turn: list[dict[str, str]], *_: object, **__: object) -> Iterator[str]:
        turns.append(turn)
        yield "Aye\x1b, "
        if len(turns) == 1:
            raise KeyboardInterrupt
        yield "matey"

    monkeypatch.setattr("loradeck.generation.stream", stream)
    talk = Chat(Local(None, None), verb.SAMPLING)
    talk.answer("Hi")
    talk.answer("More")
    assert [message["content"] for message in turns[1]] == ["Hi", "Aye\x1b, ", "More"]
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[-1]["content"] == "Aye\x1b, matey"
    assert "\x1b" not in capsys.readouterr().out


def test_a_base_without_a_chat_template_is_refused(
    run: Callable, tiny_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    for file in tiny_folder.glob("*.jinja"):
        file.unlink()
    ran = run("chat", tiny_folder)
    assert ran.code == 2
    assert "has no chat template" in ran.err
