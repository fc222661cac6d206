"""The HTTP application: every route in one list, and what every request passes. Knows where things are, not how."""

from typing import TYPE_CHECKING

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from loradeck.api import requests as s
from loradeck.api import responses as a
from loradeck.api.chat import Chat
from loradeck.api.completions import Completions
from loradeck.api.control import Control
from loradeck.api.errors import responder
from loradeck.api.keys import Keys
from loradeck.api.middleware import Guard
from loradeck.api.models import Models
from loradeck.api.openapi import Operation, document
from loradeck.api.service import Service
from loradeck.api.settings import Settings
from loradeck.api.state import ServerState
from loradeck.errors import LoradeckError

if TYPE_CHECKING:
    from loradeck.api.metrics import Metrics
    from loradeck.serve.engine import Engine


def app(
    engine: "Engine", metrics: "Metrics", *, keys: Keys | None = None, settings: Settings | None = None
) -> Starlette:
    """Return the OpenAI-compatible application of an engine; `metrics` is the engine's observer.

    Without keys anyone may do anything, so it answers only to the hosts of `settings`: the loopback's.
    """
    door = ServerState(engine, metrics, keys or Keys(), settings or Settings())
    chat, completions, models, control = Chat(door), Completions(door), Models(door), Control(door)
    service = Service(door, msgspec.json.encode(document(OPERATIONS)))
    respond = responder(door.folder)
    routes = [
        Route("/v1/models", models.all, methods=["GET"]),
        Route("/v1/models/{id:path}", models.one, methods=["GET"]),
        Route("/v1/chat/completions", chat.answer, methods=["POST"]),
        Route("/v1/completions", completions.answer, methods=["POST"]),
        Route("/v1/load_lora_adapter", control.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", control.unload, methods=["POST"]),
        Route("/lora-adapters", control.scales, methods=["GET"]),
        Route("/lora-adapters", control.rescale, methods=["POST"]),
        Route("/tokenize", service.tokenize, methods=["POST"]),
        Route("/detokenize", service.detokenize, methods=["POST"]),
        Route("/tokenizer_info", service.tokenizer, methods=["GET"]),
        Route("/health", service.health, methods=["GET"]),
        Route("/version", service.version, methods=["GET"]),
        Route("/metrics", service.metrics, methods=["GET"]),
        Route("/openapi.json", service.openapi, methods=["GET"]),
    ]
    hosts = () if door.keys else (Middleware(TrustedHostMiddleware, list(door.settings.hosts), www_redirect=False),)
    origins = list(door.settings.origins)
    cors = (Middleware(CORSMiddleware, origins, allow_methods=["*"], allow_headers=["*"]),) if origins else ()
    made = Starlette(
        routes=routes,
        middleware=[*hosts, *cors, Middleware(Guard, door.keys, respond)],
        exception_handlers=dict.fromkeys((LoradeckError, HTTPException, ClientDisconnect, Exception), respond),
    )
    made.state.door = door
    return made


OPERATIONS = [
    Operation("GET", "/v1/models", "List models", gives=a.ModelList),
    Operation("GET", "/v1/models/{id}", "Describe a model", gives=a.Model, also=(404, 422)),
    Operation("POST", "/v1/chat/completions", "Answer a conversation", s.ChatRequest, a.ChatAnswer, generates=True),
    Operation("POST", "/v1/completions", "Continue a text", s.CompletionRequest, a.CompletionAnswer, generates=True),
    Operation("POST", "/v1/load_lora_adapter", "Load an adapter", s.LoadRequest, also=(404, 422)),
    Operation("POST", "/v1/unload_lora_adapter", "Unload an adapter", s.UnloadRequest, also=(404, 422)),
    Operation("GET", "/lora-adapters", "List adapters with their scales", gives=list[a.AdapterScale]),
    Operation("POST", "/lora-adapters", "Set the scales", list[s.Scale], a.Success, also=(404,)),
    Operation("POST", "/tokenize", "Turn a text into tokens", s.TokenizeRequest, a.Tokens),
    Operation("POST", "/detokenize", "Turn tokens into a text", s.DetokenizeRequest, a.Prompt),
    Operation("GET", "/tokenizer_info", "Describe the tokenizer", gives=a.Tokenizer),
    Operation("GET", "/health", "Say whether requests are taken", gives=a.Health, also=(503,)),
    Operation("GET", "/version", "Say which version this is", gives=a.Version),
    Operation("GET", "/metrics", "Read the metrics"),
    Operation("GET", "/openapi.json", "Describe this interface", gives=dict),
]
