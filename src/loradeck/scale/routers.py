"""The routers of this process, which know its replicas."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve.request_router import RequestRouter

ROUTERS: "list[RequestRouter]" = []


def known_replicas() -> list[str]:
    """Return the ids of the replicas that requests of this process can go to."""
    return [replica.unique_id for replica in ROUTERS[-1].curr_replicas] if ROUTERS else []
