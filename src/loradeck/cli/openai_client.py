"""A small client of OpenAI-compatible servers: the list of models, streamed chat completions, and other routes.

urllib is enough for one request at a time, read line by line.
"""

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from loradeck.errors import ConfigError, RequestError, UnknownAdapterError

DATA, DONE = b"data:", b"[DONE]"
TIMEOUT = 600  # seconds without a byte

T = TypeVar("T")


@dataclass(frozen=True)
class OpenAIClient:
    """A server, by its URL with or without /v1."""

    url: str
    key: str = ""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"invalid server URL {self.url!r}", hint="Write it as in http://127.0.0.1:8000.")

    def models(self) -> list[str]:
        """Return the names of the server's models; here and in vLLM the base comes first.

        Raises:
            RequestError: the server cannot be reached, refuses, or lists no models.
        """
        with self._open("models") as response:
            names = [model.id for model in self._decode(response.read(), _Models).data]
        if not names:
            raise RequestError(f"{self.url} lists no models")
        return names

    def stream(self, model: str, messages: Sequence[dict[str, str]], **sampling: Any) -> Iterator[str]:
        """Yield an answer in pieces as they arrive. Closing the iterator closes the connection, which ends the answer.

        Raises:
            UnknownAdapterError: the server has no such model.
            RequestError: the server cannot be reached, refuses, or fails before the end.
        """
        options = {name: value for name, value in sampling.items() if value is not None}
        body = {"model": model, "messages": messages, "stream": True, **options}
        for event in self.events("chat/completions", _Event, body):
            yield from (choice.delta.content or "" for choice in event.choices)

    def read(self, path: str, kind: type[T], body: Any = None) -> T:
        """Return the answer to a GET, or to a POST if there is a body, as a `kind`.

        Raises:
            RequestError: the server cannot be reached, refuses, or answers something else.
        """
        with self._open(path, body) as response:
            return self._decode(response.read(), kind)

    def events(self, path: str, kind: type[T], body: Any = None) -> Iterator[T]:
        """Yield the server-sent events that answer a GET or a POST, as they come.

        Raises:
            RequestError: as `read`, or the stream breaks off.
        """
        with self._open(path, body) as response:
            for line in _lines(response):
                data = line.removeprefix(DATA).strip()
                if data == DONE:
                    return
                if data and line.startswith(DATA):
                    if error := self._decode(data, _Failure).error:
                        raise RequestError(error.message if isinstance(error, _Error) else error)
                    yield self._decode(data, kind)
        raise RequestError("the answer broke off", hint="Try again; the server may have stopped.")

    def _open(self, path: str, body: Any = None) -> http.client.HTTPResponse:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self.key}"} if self.key else {})
        url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/{path}"
        data = None if body is None else msgspec.json.encode(body)
        try:
            return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            with error:
                message = _error_message(error.read())
            if error.code == 404 and message and body:  # the server's hint is for those who write requests
                raise UnknownAdapterError(message.partition("\n")[0]) from error
            if error.code == 401 and message:
                hint = "Give the server's key with --key, or in LORADECK_KEY."
                raise RequestError(message.partition("\n")[0], hint=hint) from error
            raise RequestError(message or f"{url}: {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise RequestError(f"cannot reach {self.url}: {reason}", hint="Check that the server runs.") from error

    def _decode(self, text: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(text, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(f"{self.url} is not OpenAI-compatible: {error}") from error


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


class _Failure(msgspec.Struct):
    """An event that reports an error."""

    error: _Error | str | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        yield from response
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(f"the answer broke off: {error}", hint="Try again.") from error


def _error_message(body: bytes) -> str:
    """Return the message of an error body, or an empty string if the body has another shape."""
    try:
        return msgspec.json.decode(body, type=_ErrorBody).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
