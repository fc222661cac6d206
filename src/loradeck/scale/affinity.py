"""Which replica answers a request: its adapter's, unless that has too much to do.

Each adapter has an order of all replicas, by a hash of both (rendezvous hashing). The first is its home, where it stays
resident; the router keeps no state, and when a replica comes or goes only the adapters of that one move.
"""

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from loradeck.scale.rendezvous import home_of

ONE = "="  # what the id begins with where a request is for one replica


class AdapterRouter(RequestRouter):
    """Ray's router of the requests to replicas. The id of a request (`multiplexed_model_id`) is its adapter's name.

    A request without an adapter goes to the least loaded replica. So does one whose home has `replica_requests`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As RequestRouter."""
        super().__init__(*args, **kwargs)
        # Imported here: Ray pickles this module by value, so above it would take a copy of the list.
        from loradeck.scale.routers import ROUTERS

        ROUTERS.append(self)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return groups of replicas, the preferred ones first; of a group, Ray takes the least loaded."""
        adapter = pending_request.metadata.multiplexed_model_id if pending_request else ""
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if adapter.startswith(ONE):
            return [[replicas[adapter[1:]]]] if adapter[1:] in replicas else [[*replicas.values()]]
        if not adapter:
            return [[*replicas.values()]]
        home = home_of(adapter, [*replicas])
        return [[replicas[home]], [replica for name, replica in replicas.items() if name != home]]
