"""An answer between the engine's thread and its reader: a thread, or a task of any event loop."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from loradeck.errors import RequestError
from loradeck.runner.request import Request
from loradeck.sampling import SamplingParams, Token
from loradeck.serve.generation import Generation, TextChunk
from loradeck.serve.stop_strings import StopFilter

Make = Callable[..., Generation]


@pytest.fixture
def woken() -> list[int]:
    """How often the engine was told that something changed."""
    return []


@pytest.fixture
def make(tiny_tokenizer: PreTrainedTokenizerFast, woken: list[int]) -> Make:
    """Return a function that makes a generation with these stop strings."""

    def make(*stops: str, min_tokens: int = 0) -> Generation:
        request = Request([5], SamplingParams(stop=stops, min_tokens=min_tokens))
        return Generation(request, StopFilter(tiny_tokenizer, stops, min_tokens=min_tokens), lambda: woken.append(1))

    return make


@pytest.fixture
def generation(make: Make) -> Generation:
    return make()


def feed(generation: Generation, count: int, error: RequestError | None = None) -> threading.Thread:
    """Push tokens 0, 1, … from another thread, then end."""

    def work() -> None:
        for i in range(count):
            generation.push(Token(i))
        generation.end("failed" if error else "stop", error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def push(generation: Generation, tokens: Sequence[int]) -> int:
    """Push tokens as the engine does, until a stop string is complete; how many."""
    for count, token in enumerate(tokens, 1):
        generation.push(Token(token))
        if generation.stopped:
            generation.end("stop")
            return count
    generation.end("length")
    return len(tokens)


async def read(generation: Generation) -> list[int]:
    return [token.id async for token in generation]


async def read_chunks(generation: Generation) -> list[TextChunk]:
    return [chunk async for chunk in generation.chunks()]


# ---- tokens


def test_a_thread_reads_what_another_pushes(generation: Generation) -> None:
    feed(generation, 1000)
    assert [token.id for token in generation] == [*range(1000)]
    assert generation.finish == "stop"
    assert [*generation] == []


def test_tasks_of_several_loops_read_answers_of_one_engine(make: Make) -> None:
    generations = [make() for _ in range(8)]
    answers: dict[int, list[list[int]]] = {}

    async def read_all(part: list[Generation]) -> list[list[int]]:
        return await asyncio.gather(*map(read, part))

    def work(number: int) -> None:
        answers[number] = asyncio.run(read_all(generations[number * 4 : number * 4 + 4]))

    readers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for reader in readers:
        reader.start()
    for generation in generations:
        feed(generation, 200)
    for reader in readers:
        reader.join(120)
    assert answers == {0: [[*range(200)]] * 4, 1: [[*range(200)]] * 4}


def test_tokens_before_an_error_are_read_first(generation: Generation) -> None:
    feed(generation, 2, RequestError("it broke")).join()
    assert [next(generation).id, next(generation).id] == [0, 1]
    for _ in range(2):
        with pytest.raises(RequestError, match="it broke"):
            next(generation)
    with pytest.raises(RequestError, match="it broke"):
        asyncio.run(read(generation))


def test_the_first_end_counts(generation: Generation) -> None:
    generation.end("stop")
    generation.end("failed", RequestError("too late"))
    assert [*generation] == []
    assert generation.finish == "stop"


def test_cancelling_wakes_the_engine_once(generation: Generation, woken: list[int]) -> None:
    generation.cancel()
    generation.cancel()
    assert (generation.request.cancelled, woken) == (True, [1])


def test_cancelling_after_the_end_does_nothing(generation: Generation, woken: list[int]) -> None:
    generation.end("length")
    generation.cancel()
    assert (generation.request.cancelled, generation.finish, woken) == (False, "length", [])


def test_a_reader_that_was_cancelled_can_read_again(generation: Generation) -> None:
    async def main() -> list[int]:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(generation), 0.01)
        feed(generation, 3)
        return await read(generation)

    assert asyncio.run(main()) == [0, 1, 2]


def test_an_event_loop_that_closes_meanwhile_does_the_engine_no_harm(
    generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.new_event_loop()
    generation._waiter = loop, loop.create_future()
    loop.close()
    monkeypatch.setattr(loop, "is_closed", lambda: False)  # as it was a moment ago
    generation.push(Token(7))
    assert next(generation) == Token(7)


# ---- text


@pytest.mark.parametrize("stops", [(), ("zz",)])
def test_chunks_bring_the_text_with_the_tokens(
    make: Make, tiny_tokenizer: PreTrainedTokenizerFast, stops: tuple[str, ...]
) -> None:
    ids = tiny_tokenizer("a語zb")["input_ids"]
    generation = make(*stops)
    push(generation, [*ids, tiny_tokenizer.eos_token_id])
    chunks = asyncio.run(read_chunks(generation))
    assert [chunk.token.id for chunk in chunks if chunk.token] == [*ids, tiny_tokenizer.eos_token_id]
    assert [chunk.text for chunk in chunks] == ["a", "", "", "語", *(["", "zb"] if stops else ["z", "b"]), ""]
    assert [chunk.offset for chunk in chunks] == [0, 1, 1, 1, 2, 3, 4]


def test_held_text_comes_in_a_chunk_without_a_token(make: Make, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    generation = make("END")
    push(generation, tiny_tokenizer("aEN")["input_ids"])
    *_, last = asyncio.run(read_chunks(generation))
    assert last == TextChunk("EN")


def test_a_stop_token_has_no_text(make: Make, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for stops in ((), ("zz",)):
        generation = make(*stops)
        generation.push(Token(tiny_tokenizer("a")["input_ids"][0], ends=True))
        generation.end("stop")
        assert generation.text() == ""


@pytest.mark.parametrize(
    ("text", "stops", "min_tokens", "answer", "count"),
    [
        ("one, two", (",",), 0, "one", 4),
        ("one, two", ("x", "two", "wo"), 0, "one, ", 8),
        ("one, two", ("o", "one"), 0, "", 1),  # the first that is complete
        ("日本語だ", ("語",), 0, "日本", 9),
        ("日本語だ", ("本語",), 0, "日", 9),
        ("a.b.c", (".",), 2, "a.b", 4),
        ("a.b.c", (".",), 3, "a.b", 4),
        ("a.b.c", (".",), 4, "a.b.c", None),
        ("a.b.c", (".b",), 2, "a", 3),  # it may begin before min_tokens
        ("a.b.c", (".b",), 3, "a.b.c", None),
    ],
)
def test_a_stop_string_ends_at_the_token_that_completes_it(
    make: Make,
    tiny_tokenizer: PreTrainedTokenizerFast,
    text: str,
    stops: tuple[str, ...],
    min_tokens: int,
    answer: str,
    count: int | None,
) -> None:
    """Nobody reads until the end; every token is a byte."""
    for read_text in (Generation.text, lambda own: "".join(chunk.text for chunk in asyncio.run(read_chunks(own)))):
        generation = make(*stops, min_tokens=min_tokens)
        assert push(generation, tiny_tokenizer(text)["input_ids"]) == count or len(text)
        assert generation.finish == ("length" if count is None else "stop")
        assert read_text(generation) == answer
