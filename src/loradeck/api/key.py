"""What the API key of a request may do, for clients that offer only that."""

from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from loradeck.api.responses import json_response
from loradeck.api.state import state_of


class KeyRights(msgspec.Struct, kw_only=True):
    """`GET /v1/key`."""

    name: str
    """The key's name in the keys file; "" on a server without keys."""
    required: bool
    """Whether the server has keys."""
    base: str
    task: str
    """The task that the base was loaded for."""
    adapters: list[str]
    """Patterns of the adapters' names that it may use."""
    create: list[str]
    """Patterns of the names that it may give to adapters."""
    control: bool
    """Whether it may load, publish and remove adapters, and read the metrics."""
    train: bool
    """Whether it may upload files and train adapters, and this server does."""
    store: bool
    """Whether the server has a folder of adapters."""
    object: Literal["key"] = "key"


async def get_key(request: Request) -> Response:
    """Return what the API key of this request may do."""
    state, key = state_of(request), request.state.key
    rights = KeyRights(
        name=key.name,
        required=len(state.keys) > 0,
        base=state.names.base,
        task=state.engine.base.task,
        adapters=[*key.adapters],
        create=[*(key.adapters if key.create is None else key.create)],
        control=key.control,
        train=key.train and state.training is not None,
        store=state.engine.store is not None,
    )
    return json_response(rights)
