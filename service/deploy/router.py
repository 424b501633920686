"""Ray Serve's side of `routing`: who there is and how much each has to do, as the router of a deployment handle knows it.

Runs in the process of the gate, on the router's own event loop. Named in the config by its path; nothing else imports it.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from ray.exceptions import RayError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from service.deploy.affinity import Affinity
from service.deploy.exchange import Forwarded
from service.deploy.routing import Loads, Routing

_NUM_CHOICES = 4  # replicas of which the least loaded is taken where none is preferred; two would do, more cost nothing
_NUM_ASKED = 4
_ASK_S = 0.5
_FULL = 0.97  # of the K/V: the next prompt would cost a running sequence its place


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # ray is not installed where types are checked
    """The first rank is the replica that `Routing` prefers, the second a few at random. Ray takes the least loaded of a rank, skips a rank
    whose replicas have as many requests as they may, and asks again after a pause where all have."""

    def initialize_state(self, has_peers: bool = False, **_: Any) -> None:
        """has_peers: there are more gates, so that this router's own count of a replica's requests is not all of them."""
        self._routing = Routing()
        self._loads = Loads()
        self._has_peers = has_peers
        self._looks: dict[str, float] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        affinity = _affinity(pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        by_name = {each.replica_id.unique_id: each for each in candidate_replicas}
        self._loads.keep(by_name.keys())
        full = {name for name, each in by_name.items() if (each.routing_stats or {}).get("kv_use", 0.0) > _FULL}
        preferred = self._routing.prefer(affinity, self._loads.by_name, full)
        if preferred and preferred == affinity.replica:
            return [[by_name[preferred]]]
        if self._has_peers:
            self._hear(by_name)
            preferred = await self._asked(preferred, affinity, by_name, full)
        first = [[by_name[preferred]]] if preferred in by_name else []
        return [*first, random.sample(candidate_replicas, min(_NUM_CHOICES, len(candidate_replicas)))]

    def _hear(self, by_name: dict[str, RunningReplica]) -> None:
        """What replicas told since the last time, of all that they have."""
        for name, each in by_name.items():
            stats = each.routing_stats or {}
            if (look := stats.get("look", 0.0)) != self._looks.get(name, 0.0):
                self._looks[name] = look
                self._loads.told(name, int(stats["requests"]))

    async def _asked(self, preferred: str, affinity: Affinity, by_name: dict[str, RunningReplica], full: set[str]) -> str:
        """The first of some that are preferred, one after another, which says itself that it is not overloaded."""
        for _ in range(_NUM_ASKED):
            if preferred not in by_name:
                break
            try:
                total = await asyncio.wait_for(by_name[preferred].get_queue_len(deadline_s=_ASK_S), _ASK_S)
            except (TimeoutError, RayError):
                return ""
            self._loads.told(preferred, total)
            again = self._routing.prefer(affinity, self._loads.by_name, full)
            if again == preferred:
                return preferred
            preferred = again
        return preferred

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._routing.record(_affinity(pending_request), replica_id.unique_id)
        self._loads.sent(replica_id.unique_id, pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._loads.ended(replica_id.unique_id, internal_request_id)


def _affinity(pending: PendingRequest | None) -> Affinity:
    request = pending.args[0] if pending is not None and pending.args else None
    return request.affinity if isinstance(request, Forwarded) else Affinity()
