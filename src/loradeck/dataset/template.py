"""Render a conversation with the base's chat template, and tell which text is trained on.

The mask is right when the text trained on is the answers and the marks that end them, no more and no less. Few chat
templates mark the assistant's text themselves (Llama's, Qwen's and Gemma's do not), so a conversation is rendered
message by message, each rendering a prefix of the next. Text that a template writes before an answer is context only,
even an empty thinking block: the model should not learn to begin its answers with one.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from loradeck.base.chat_template import ignored_tools
from loradeck.dataset.message import Json, Message
from loradeck.dataset.record import Conversation, Span
from loradeck.errors import ConfigError, DataError

PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}"  # rendered as an answer, to see what the template writes around it
ONE_OF = "leave them out, or use another base"
NO_THINKING = re.compile(r"\s*<think>\s*</think>\s*")
THINKING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def sequences(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Iterator[list[Span]]:
    """Yield sequences of spans: the context before each trained message, then the message up to its end.

    There is one sequence, unless the template renders an earlier message differently once a later one follows: some
    remove its thinking or move the system message. Then each answer gets a sequence of its own, after exactly the
    text that precedes it when it is generated.

    Raises:
        DataError: the template does not fit the conversation.
    """
    spans: list[Span] = []
    rendered = ""
    if ignored := _ignored_tools(tokenizer, conversation):
        raise DataError(f"$: the base's chat template ignores {ignored}; {ONE_OF}")
    for index, message in enumerate(conversation.messages):
        if not message.trained:
            continue
        context, answer = _split_turn(tokenizer, conversation, index)
        if spans and not context.startswith(rendered):
            yield spans
            spans = []
            rendered = ""
        spans += [Span(context[len(rendered) :], trained=False), Span(answer, trained=True)]
        rendered = context + answer
    yield spans


@dataclass(frozen=True, slots=True)
class Marks:
    """What a chat template writes around the contents of messages; "" where it writes nothing."""

    begin: str = ""
    """The begin-of-text token, if it stands at the beginning of the text and nowhere else."""
    answer: str = ""
    """After a user's message, up to where the answer begins."""
    end: str = ""
    """After an answer."""
    places_system: bool = True
    """Whether it accepts a system message and writes its content."""


def marks(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """Return what a tokenizer's template writes; nothing if there is no template, or it fails on a simple message."""
    return _marks(tokenizer, str(tokenizer.chat_template or ""))


@lru_cache(maxsize=8)
def _marks(tokenizer: PreTrainedTokenizerBase, template: str) -> Marks:
    if not template:
        return Marks()
    user, system = Message("user", "?"), Message("system", PLACEHOLDER)
    try:
        talk = _render(tokenizer, [user, Message("assistant", PLACEHOLDER)], None)
        prompt = _render(tokenizer, [Message("user", PLACEHOLDER)], None, add_generation_prompt=True)
    except DataError:  # it may accept other messages; each record reports its own
        return Marks()
    try:
        places_system = PLACEHOLDER in _render(tokenizer, [system, user], None)
    except DataError:
        places_system = False
    begin = str(tokenizer.bos_token or "")
    return Marks(
        begin=begin if begin and talk.startswith(begin) and talk.count(begin) == 1 else "",
        answer=prompt.rpartition(PLACEHOLDER)[2].strip(),
        end=talk.rpartition(PLACEHOLDER)[2].rstrip(),
        places_system=places_system,
    )


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Return messages with each system message put into the user message that follows it, before its content."""
    folded: list[Message] = []
    contents: list[str] = []
    for message in messages:
        if message.role == "system":
            contents.append(message.content)
        elif message.role == "user" and contents:
            folded.append(replace(message, content="\n\n".join([*filter(str.strip, contents), message.content])))
            contents = []
        else:
            folded.append(message)
    return folded


def _split_turn(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, index: int) -> tuple[str, str]:
    """Return the text before the answer in message `index`, and the answer with its end of turn."""
    before, message, tools = conversation.messages[:index], conversation.messages[index], conversation.tools
    where = f"$: message {index + 1}, {message.role}"
    prompt = _render(tokenizer, before, tools, add_generation_prompt=True)
    if any(each.role == "system" and each.content.strip() not in prompt for each in before):
        raise _no_system("$: the base's chat template drops the system message")
    probe = _render(tokenizer, [*before, Message("assistant", PLACEHOLDER)], tools)
    reply = _render(tokenizer, [*before, message], tools).rstrip()
    head, _, end = probe.removeprefix(prompt).partition(PLACEHOLDER)
    end = end.rstrip()  # white space after the end of a turn is never generated
    if not end:
        raise DataError("$: the chat template marks no end of a turn, so the adapter could not learn to stop")
    if not (probe.startswith(prompt) and reply.startswith(prompt) and reply.endswith(end)):
        raise DataError(f"{where}: the chat template renders the messages before it differently once it follows")
    answer = reply[len(prompt) : len(reply) - len(end)]
    if answer.startswith(head):
        prompt, answer = prompt + head, answer.removeprefix(head)
    if empty := NO_THINKING.match(answer):
        prompt, answer = prompt + empty[0], answer[empty.end() :]
    _check(where, message, answer)
    return prompt, answer + end


def _check(where: str, message: Message, answer: str) -> None:
    """Refuse an answer that lacks some of its message.

    Each template writes thinking and tool calls in its own way, so these are only required to appear, in order.
    """
    thinking = THINKING.fullmatch(message.content)
    reasoning, content = (message.reasoning, message.content) if thinking is None else (thinking[1], thinking[2])
    names = [call["function"]["name"] for call in message.tool_calls]
    if reasoning.strip() or names:
        complete = _in_order([reasoning.strip(), content.strip(), *names], answer)
    else:
        complete = answer.strip() in (content.strip(), message.content.strip())
    if not complete:
        parts = [("content", content.strip()), ("reasoning", reasoning.strip()), ("tool calls", names)]
        lost = " and ".join(name for name, part in parts if part)
        raise DataError(f"{where}: the chat template drops or rewrites its {lost}; {ONE_OF}")


def _ignored_tools(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str | None:
    try:
        messages = [message.for_template() for message in conversation.messages]
        return ignored_tools(tokenizer, messages, conversation.tools)
    except ConfigError:  # the template rejects the messages, which the turns below say more exactly
        return None


def _no_system(message: str) -> DataError:
    return DataError(
        message,
        hint="If it has no place for a system message, put it into the user's:",
        python="DataConfig(fold_system=True)",
        cli="--fold-system, or in a run file fold_system = true",
        http='"lora": {"fold_system": true}',
    )


def _in_order(parts: Sequence[str], text: str) -> bool:
    return re.search(".*".join(map(re.escape, parts)), text, re.DOTALL) is not None


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: list[Json] | None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    conversation = [message.for_template() for message in messages]
    settings: Json = {"tools": tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        return str(tokenizer.apply_chat_template(conversation, **settings))
    except Exception as error:  # a template is a program from a stranger and can raise anything
        refusal = f"$: the base's chat template refuses it: {str(error)!r:.100}"
        system = any(message.role == "system" for message in messages)
        raise (_no_system(refusal) if system else DataError(refusal)) from error
