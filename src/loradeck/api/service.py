"""The small routes: is it there, what is it, what does it count, what are a text's tokens. Knows no generation."""

from dataclasses import dataclass
from typing import Any

import msgspec
from anyio.to_thread import run_sync
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from loradeck import __version__
from loradeck.api import parse, prompt
from loradeck.api.errors import JSON, HttpError, ending
from loradeck.api.requests import DetokenizeRequest, TokenizeRequest
from loradeck.api.responses import Health, Prompt, Tokenizer, Tokens, Version
from loradeck.api.state import ServerState


@dataclass(frozen=True, slots=True)
class Service:
    """The routes."""

    door: ServerState
    document: bytes
    """The OpenAPI document."""

    async def health(self, _: Request) -> Response:
        """Say whether requests are taken."""
        if self.door.ending:
            raise ending()
        return reply(Health("ok"))

    async def version(self, _: Request) -> Response:
        """Return the library's version."""
        return reply(Version(__version__))

    async def metrics(self, request: Request) -> Response:
        """Return the metrics, which name every adapter, so a key needs control."""
        request.state.key.check_control()
        return Response(await run_sync(self.door.metrics.read), media_type=CONTENT_TYPE_LATEST)

    async def openapi(self, _: Request) -> Response:
        """Return the OpenAPI document."""
        return Response(self.document, media_type=JSON)

    async def tokenize(self, request: Request) -> Response:
        """Return the token ids of a text, or of messages."""
        asked = await parse.read(request, TokenizeRequest, self.door.settings.max_body_bytes)
        return reply(await run_sync(self._tokens, asked))

    async def detokenize(self, request: Request) -> Response:
        """Return the text of token ids."""
        asked = await parse.read(request, DetokenizeRequest, self.door.settings.max_body_bytes)
        return reply(await run_sync(self._text, asked))

    async def tokenizer(self, _: Request) -> Response:
        """Return the tokenizer's special tokens and its chat template."""
        own = self.door.engine.base.tokenizer
        template = own.chat_template if isinstance(own.chat_template, str) else None  # some have several
        return reply(Tokenizer(own.eos_token, own.bos_token, own.pad_token, template))

    def _tokens(self, asked: TokenizeRequest) -> Tokens:
        base = self.door.engine.base
        if (asked.prompt is None) == (asked.messages is None):
            raise HttpError(400, "Give either a prompt or messages.", param="prompt")
        if asked.prompt is None:
            ids = prompt.chat(base.tokenizer, asked)
        else:
            ids = prompt.encode(base.tokenizer, asked.prompt, special=asked.add_special_tokens is not False)
        return Tokens(len(ids), base.context, ids)

    def _text(self, asked: DetokenizeRequest) -> Prompt:
        tokenizer = self.door.engine.base.tokenizer
        return Prompt(str(tokenizer.decode(prompt.known(tokenizer, asked.tokens, "tokens"))))


def reply(answer: Any) -> Response:
    """Return an answer as JSON."""
    return Response(msgspec.json.encode(answer), media_type=JSON)
