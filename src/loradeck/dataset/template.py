"""Render a conversation with the base's chat template, and tell which text is trained on.

The mask is right when the text trained on is the answers and the marks that end them, no more and no less. Few chat
templates mark the assistant's text themselves (Llama's, Qwen's and Gemma's do not), so a conversation is rendered
message by message, each rendering a prefix of the next. Text that a template writes before an answer is context only,
even an empty thinking block: the model should not learn to begin its answers with one.
"""

import re
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from loradeck.dataset.message import Json, Message
from loradeck.dataset.record import Conversation, Span
from loradeck.errors import DataError

PLACEHOLDER = "\N{OBJECT REPLACEMENT CHARACTER}"  # rendered as an answer, to see what the template writes around it
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


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the template writes after an answer; "" if there is no template, or it writes nothing."""
    if tokenizer.chat_template is None:
        return ""
    messages = [Message("user", "?"), Message("assistant", PLACEHOLDER)]
    return _render(tokenizer, messages, None).rpartition(PLACEHOLDER)[2].rstrip()


def _split_turn(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, index: int) -> tuple[str, str]:
    """Return the text before the answer in message `index`, and the answer with its end of turn."""
    before, message, tools = conversation.messages[:index], conversation.messages[index], conversation.tools
    where = f"$: message {index + 1}, {message.role}"
    prompt = _render(tokenizer, before, tools, add_generation_prompt=True)
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
        raise DataError(f"{where}: the chat template drops or rewrites its {lost}; leave them out, or use another base")


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
        raise DataError(f"$: the base's chat template refuses it: {str(error)!r:.100}") from error
