"""Scheduled that is worth doing only while the client waits for it. Knows ASGI's messages; knows no engine."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

T = TypeVar("T")


async def attend(receive: Receive, *work: Coroutine[Any, Any, T]) -> list[T]:
    """Run all of `work` side by side and return its results; when one fails, or the client goes, end the others.

    Raises:
        ClientDisconnect: the client has gone.
        Exception: the first that `work` raises.
    """
    try:
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(_gone(receive))
            tasks = [group.create_task(one) for one in work]
            await asyncio.wait(tasks)
            watch.cancel()
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass  # the rest of the body
    raise ClientDisconnect
