"""Responses that can be asked for again, and the items they are made of: bytes in memory, bounded by count and by size.

Knows no JSON, no HTTP and no engine. Each tenant sees its own alone; where room is needed, the tenant that holds most gives up what
it has not used for longest. Called by the Responses routes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace

# What an entry costs beside its own bytes: the objects and table slots around it.
_ENTRY_BYTES = 1024
_ITEM_BYTES = 256
_EVENT_BYTES = 48


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Of all tenants together. max_bytes counts items once, however many responses share them."""

    max_responses: int = 4096
    max_bytes: int = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Item:
    """One item of input or output, as JSON."""

    id: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """A response that has ended. body: its JSON. inputs: all that it answered to, oldest first. events: server-sent, in order; only of
    responses that ran in the background."""

    id: str
    body: bytes
    inputs: tuple[Item, ...]
    outputs: tuple[Item, ...]
    is_background: bool = False
    events: tuple[bytes, ...] = ()

    @property
    def items(self) -> tuple[Item, ...]:
        return self.inputs + self.outputs


@dataclass(slots=True)
class _Shelf:
    """One tenant's. responses: the least recently used first. held: equal items are one, with how many places hold it."""

    responses: OrderedDict[str, Stored] = field(default_factory=OrderedDict)
    held: dict[Item, tuple[Item, int]] = field(default_factory=dict)
    by_id: dict[str, Item] = field(default_factory=dict)
    num_bytes: int = 0

    def put(self, response: Stored) -> None:
        inputs = tuple(map(self._hold, response.inputs))
        outputs = tuple(map(self._hold, response.outputs))
        self.responses[response.id] = replace(response, inputs=inputs, outputs=outputs)
        self.num_bytes += _own_bytes(response)

    def _hold(self, item: Item) -> Item:
        known, num_holders = self.held.get(item, (item, 0))
        self.held[known] = (known, num_holders + 1)
        self.by_id[known.id] = known
        self.num_bytes += 0 if num_holders else _item_bytes(known)
        return known

    def take(self, response_id: str) -> None:
        response = self.responses.pop(response_id)
        self.num_bytes -= _own_bytes(response)
        for item in response.items:
            self._let_go(item)

    def _let_go(self, item: Item) -> None:
        known, num_holders = self.held.pop(item)
        if num_holders > 1:
            self.held[known] = (known, num_holders - 1)
            return
        self.num_bytes -= _item_bytes(known)
        if self.by_id.get(known.id) == known:
            del self.by_id[known.id]


class ResponseStore:
    def __init__(self, limits: StoreLimits | None = None) -> None:
        self.limits = limits or StoreLimits()
        self._shelves: dict[str, _Shelf] = {}

    @property
    def num_responses(self) -> int:
        return sum(len(shelf.responses) for shelf in self._shelves.values())

    @property
    def num_bytes(self) -> int:
        return sum(shelf.num_bytes for shelf in self._shelves.values())

    def put(self, tenant: str, response: Stored) -> None:
        """Evicts others until it fits. One that is larger than the whole store is kept without its events, or not at all.

        Mutates: the store.
        """
        if _size(response) > self.limits.max_bytes:
            response = replace(response, events=())
        if _size(response) > self.limits.max_bytes or self.limits.max_responses < 1:
            return
        self._shelves.setdefault(tenant, _Shelf()).put(response)
        while self.num_responses > self.limits.max_responses or self.num_bytes > self.limits.max_bytes:
            self._evict(keep=response.id)

    def _evict(self, keep: str) -> None:
        holders = [(shelf.num_bytes, tenant) for tenant, shelf in self._shelves.items() if any(each != keep for each in shelf.responses)]
        if not holders:
            return
        shelf = self._shelves[max(holders)[1]]
        shelf.take(next(each for each in shelf.responses if each != keep))

    def get(self, tenant: str, response_id: str) -> Stored | None:
        """Counts as a use. Mutates: the order of eviction."""
        shelf = self._shelves.get(tenant)
        if shelf is None or response_id not in shelf.responses:
            return None
        shelf.responses.move_to_end(response_id)
        return shelf.responses[response_id]

    def item(self, tenant: str, item_id: str) -> Item | None:
        shelf = self._shelves.get(tenant)
        return shelf.by_id.get(item_id) if shelf is not None else None

    def delete(self, tenant: str, response_id: str) -> bool:
        """Was it there? Its items stay as long as other responses hold them. Mutates: the store."""
        shelf = self._shelves.get(tenant)
        if shelf is None or response_id not in shelf.responses:
            return False
        shelf.take(response_id)
        if not shelf.responses:
            del self._shelves[tenant]
        return True


def _item_bytes(item: Item) -> int:
    return _ITEM_BYTES + len(item.data)


def _size(response: Stored) -> int:
    return _own_bytes(response) + sum(map(_item_bytes, response.items))


def _own_bytes(response: Stored) -> int:
    """Without the items, which others may share."""
    return _ENTRY_BYTES + len(response.body) + sum(_EVENT_BYTES + len(event) for event in response.events) + 8 * len(response.items)
