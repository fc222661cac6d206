"""A server that answers as OpenAI's does: which models it has, and its answers as they come. Knows HTTP, no engine.

urllib is enough: one request at a time, and lines as they come.
"""

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from loradeck.errors import ConfigError, RequestError

DATA, DONE = b"data:", b"[DONE]"
LONGEST = 600  # seconds without a byte

T = TypeVar("T")


@dataclass(frozen=True)
class OpenAIClient:
    """A server, by its URL with or without /v1."""

    url: str
    key: str = ""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"{self.url!r} is no server", hint="Write it as in http://127.0.0.1:8000.")

    def models(self) -> list[str]:
        """Return the names of its models; here and in vLLM the base comes first.

        Raises:
            RequestError: it cannot be reached, refuses, or lists none.
        """
        with self._asked("models") as answer:
            names = [model.id for model in self._read(answer.read(), _Models).data]
        if not names:
            raise RequestError(f"{self.url} has no models")
        return names

    def stream(self, model: str, messages: Sequence[dict[str, str]], **sampling: Any) -> Iterator[str]:
        """Yield an answer in pieces as they come. Left early, it is given up, and the server knows.

        Raises:
            RequestError: the server cannot be reached, or refuses, or fails on the way.
        """
        asked = {name: value for name, value in sampling.items() if value is not None}
        with self._asked("chat/completions", {"model": model, "messages": messages, "stream": True, **asked}) as answer:
            for line in _lines(answer):
                data = line.removeprefix(DATA).strip()
                if data == DONE:
                    return
                if data and line.startswith(DATA):
                    event = self._read(data, _Event)
                    if event.error is not None:
                        raise RequestError(event.error.message if isinstance(event.error, _Error) else event.error)
                    yield from (choice.delta.content or "" for choice in event.choices)
        raise RequestError("the answer broke off", hint="Ask again; the server may have been stopped.")

    def _asked(self, path: str, body: Any = None) -> http.client.HTTPResponse:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self.key}"} if self.key else {})
        url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/{path}"
        sent = None if body is None else msgspec.json.encode(body)
        try:
            return urllib.request.urlopen(urllib.request.Request(url, sent, headers), timeout=LONGEST)
        except urllib.error.HTTPError as error:
            with error:
                raise RequestError(_refusal(error.read()) or f"{url} answers {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = getattr(error, "reason", error)
            raise RequestError(f"{self.url} cannot be reached: {why}", hint="Is the server there?") from error

    def _read(self, text: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(text, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(f"{self.url} does not answer as OpenAI does: {error}") from error


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Error(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    """One event of a stream."""

    choices: list[_Choice] = []
    error: _Error | str | None = None


class _Refusal(msgspec.Struct):
    error: _Error


def _lines(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        yield from answer
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(f"the answer broke off: {error}", hint="Ask again.") from error


def _refusal(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Refusal).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
