"""Ray Serve's side of `routing`: who there is and how much each has to do, as the router of a deployment handle knows it.

Runs in the process of the gate, on the router's own event loop. Named in the config by its path; nothing else imports it.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from service.deploy.affinity import Affinity
from service.deploy.exchange import Forwarded
from service.deploy.routing import Routing

_NUM_CHOICES = 4  # replicas of which the least loaded is taken where none is preferred; two would do, more cost nothing
_FULL = 0.97  # of the K/V: the next prompt would cost a running sequence its place


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # ray is not installed where types are checked
    """The first rank is the replica that `Routing` prefers, the second a few at random. Ray takes the least loaded of a rank, skips a rank
    whose replicas have as many requests as they may, and asks again after a pause where all have."""

    def initialize_state(self, bound: float = 1.25, spare: int = 8, **_: Any) -> None:
        self._routing = Routing(bound, spare)
        self._in_flight: dict[str, set[str]] = {}  # by replica: requests of this router, which never go stale as Ray's counts do

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        affinity = _affinity(pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        by_name = {each.replica_id.unique_id: each for each in candidate_replicas}
        full = {name for name, each in by_name.items() if (each.routing_stats or {}).get("kv_use", 0.0) > _FULL}
        preferred = self._routing.prefer(affinity, {name: self._load(name, each) for name, each in by_name.items()}, full)
        first = [[by_name[preferred]]] if preferred else []
        if preferred and preferred == affinity.replica:
            return first
        return [*first, random.sample(candidate_replicas, min(_NUM_CHOICES, len(candidate_replicas)))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._routing.record(_affinity(pending_request), replica_id.unique_id)
        self._in_flight.setdefault(replica_id.unique_id, set()).add(pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._in_flight.get(replica_id.unique_id, set()).discard(internal_request_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        here = {each.replica_id.unique_id for each in replicas}
        for name in self._in_flight.keys() - here:
            del self._in_flight[name]

    def _load(self, name: str, replica: RunningReplica) -> int:
        """Ray's count has the requests of other routers too, where it is fresh."""
        return max(len(self._in_flight.get(name, ())), self._replica_queue_len_cache.get(replica.replica_id) or 0)


def _affinity(pending: PendingRequest | None) -> Affinity:
    request = pending.args[0] if pending is not None and pending.args else None
    return request.affinity if isinstance(request, Forwarded) else Affinity()
