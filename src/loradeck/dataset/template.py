"""A conversation through a base's chat template: what is read, and what is learned. Knows text; knows no tokens.

A mask is right when the learned text is the answers and the marks that end them, no more and no less. Few chat
templates mark the assistant's text themselves (Llama's, Qwen's and Gemma's do not), so a conversation is rendered turn
by turn, each rendering a prefix of the next. What a template writes before an answer is read, an empty block of
thinking with it: no answer is to learn to begin so.
"""

import re
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from loradeck.dataset.message import Json, Message
from loradeck.dataset.record import Conversation, Span
from loradeck.errors import DataError

ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands in for an answer, to see what the template writes around it
NO_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def sequences(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Iterator[list[Span]]:
    """Yield sequences of segments: what is read before each learned turn, then the turn up to its end.

    One sequence, unless the template renders an earlier turn otherwise once a later one follows, as those do that take
    out its thinking or move the system's turn: then each answer stands behind what would stand before it when it is
    generated, in a sequence of its own.

    Raises:
        DataError: the template does not fit the conversation.
    """
    segments: list[Span] = []
    done = ""
    for at, message in enumerate(conversation.messages):
        if not message.learned:
            continue
        read, answer = _turn(tokenizer, conversation, at)
        if segments and not read.startswith(done):
            yield segments
            segments = []
            done = ""
        segments += [(read[len(done) :], False), (answer, True)]
        done = read + answer
    yield segments


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the template writes after an answer; nothing where there is no template, or it ends none."""
    if tokenizer.chat_template is None:
        return ""
    turns = [Message("user", "?"), Message("assistant", ANSWER)]
    return _render(tokenizer, turns, None).rpartition(ANSWER)[2].rstrip()


def _turn(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, at: int) -> tuple[str, str]:
    """Return what is read before the turn numbered `at`, and what of it is learned."""
    before, message, declared = conversation.messages[:at], conversation.messages[at], conversation.tools
    where = f"$: turn {at + 1}, {message.role}"
    prompt = _render(tokenizer, before, declared, add_generation_prompt=True)
    marked = _render(tokenizer, [*before, Message("assistant", ANSWER)], declared)
    reply = _render(tokenizer, [*before, message], declared).rstrip()
    head, _, end = marked.removeprefix(prompt).partition(ANSWER)
    end = end.rstrip()  # white space after the end of a turn is never generated
    if not end:
        raise DataError("$: the chat template marks no end of a turn, so the adapter could not learn to stop")
    if not (marked.startswith(prompt) and reply.startswith(prompt) and reply.endswith(end)):
        raise DataError(
            f"{where}: the chat template does not render what comes before it as the beginning of the whole"
        )
    answer = reply[len(prompt) : len(reply) - len(end)]
    if answer.startswith(head):
        prompt, answer = prompt + head, answer.removeprefix(head)
    if empty := NO_THOUGHT.match(answer):
        prompt, answer = prompt + empty[0], answer[empty.end() :]
    _check(where, message, answer)
    return prompt, answer + end


def _check(where: str, message: Message, answer: str) -> None:
    """Compare what is to be learned with the turn.

    Thinking and calls are written in as many ways as there are templates: they must be there, in their order.
    """
    thought = THOUGHT.fullmatch(message.content)
    reasoning, content = (message.reasoning, message.content) if thought is None else (thought[1], thought[2])
    names = [call["function"]["name"] for call in message.tool_calls]
    if reasoning.strip() or names:
        kept = _in_order([reasoning.strip(), content.strip(), *names], answer)
    else:
        kept = answer.strip() in (content.strip(), message.content.strip())
    if not kept:
        parts = [("content", content.strip()), ("reasoning", reasoning.strip()), ("tool calls", names)]
        its = " and ".join(name for name, part in parts if part)
        raise DataError(f"{where}: the chat template drops or rewrites its {its}; leave them out, or take another base")


def _in_order(pieces: Sequence[str], text: str) -> bool:
    return re.search(".*".join(map(re.escape, pieces)), text, re.DOTALL) is not None


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: list[Json] | None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    turns = [message.for_template() for message in messages]
    settings: Json = {"tools": tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        return str(tokenizer.apply_chat_template(turns, **settings))
    except Exception as error:  # a template is a stranger's program and can fail in any way
        raise DataError(f"$: the base's chat template refuses it: {str(error)!r:.100}") from error
