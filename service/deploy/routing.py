"""Which replica a request goes to: the one that knows its beginning, as long as that one is not overloaded.

Pure: stdlib only, no clock, no thread, no network; loads are arguments. The router on a cluster and the simulation in bench/ both run it.
Source: "Consistent Hashing with Bounded Loads" (Mirrokni, Thorup, Zadimoghaddam, 2018) for beginnings that nobody knows yet.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set

from service.deploy.affinity import Affinity

_POINTS = 64  # of each replica on the ring; 64 leave shares of it that differ by some 12 %, which the bound evens out
_MAX_HOLDERS = 8  # replicas remembered for one beginning: what is asked that often is known everywhere soon enough


class Ring:
    """Places of replicas on a circle of 64-bit numbers. A replica that comes or goes moves only keys of its own."""

    def __init__(self, replicas: Iterable[str] = ()) -> None:
        self._names = frozenset(replicas)
        places = sorted((_place(f"{name}/{point}"), name) for name in self._names for point in range(_POINTS))
        self._places = [place for place, _ in places]
        self._owners = [name for _, name in places]

    @property
    def names(self) -> frozenset[str]:
        return self._names

    def walk(self, key: int) -> Iterator[str]:
        """Every replica once, in the order in which they follow the key."""
        start = bisect(self._places, key)
        seen = set[str]()
        for step in range(len(self._owners)):
            name = self._owners[(start + step) % len(self._owners)]
            if name not in seen:
                seen.add(name)
                yield name
            if len(seen) == len(self._names):
                return


class Loads:
    """Requests of each replica as one router knows them: its own, exactly, and those of other routers as far as it was told.

    by_name: of the replicas that there are. A router that knows its own alone sends what others send, too, to replicas that are at their
    limit.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, int] = {}
        self._own: dict[str, set[str]] = {}

    def sent(self, name: str, request_id: str) -> None:
        own = self._own.setdefault(name, set())
        if name in self.by_name and request_id not in own:
            self.by_name[name] += 1
        own.add(request_id)

    def ended(self, name: str, request_id: str) -> None:
        own = self._own.get(name, set())
        if name in self.by_name and request_id in own:
            self.by_name[name] -= 1
        own.discard(request_id)

    def told(self, name: str, total: int) -> None:
        """The replica's own count of all that it has, which is moved by what this router sends until the next."""
        if name in self.by_name:
            self.by_name[name] = max(total, len(self._own.get(name, ())))

    def keep(self, names: Set[str]) -> None:
        """These are the replicas that there are from now on."""
        if self.by_name.keys() == names:
            return
        for name in self.by_name.keys() - names:
            del self.by_name[name]
            self._own.pop(name, None)
        for name in names:
            self.by_name.setdefault(name, 0)


class Routing:
    """Remembers who has read which beginnings, newest first, and ranks replicas for a request.

    bound: a replica takes at most so many times the mean load; more than 1. spare: requests that a replica may always have, whatever the
    mean: they share its steps at little cost. Both by the simulation, 100 replicas: a bound of 1.25 loses up to 7 points of cached
    tokens against 2 and gains nothing; with 8 to spare the slowest wait longer. num_remembered: beginnings that are kept in mind.
    """

    def __init__(self, bound: float = 2.0, spare: int = 4, num_remembered: int = 200_000) -> None:
        if not bound > 1:
            raise ValueError("bound must be more than 1: with 1 no replica could be preferred")
        self._bound = bound
        self._spare = spare
        self._num_remembered = num_remembered
        self._holders: OrderedDict[int, tuple[str, ...]] = OrderedDict()
        self._ring = Ring()

    def limit(self, loads: Mapping[str, int]) -> int:
        """The load that no replica may have reached to be preferred. At least one is always below it."""
        return max(self._spare, math.ceil(self._bound * (sum(loads.values()) + 1) / max(len(loads), 1)))

    def prefer(self, affinity: Affinity, loads: Mapping[str, int], full: Collection[str] = ()) -> str:
        """The replica for a request, "" where any will do: then the least loaded is the best. loads: requests that each replica has, by
        name; these are the replicas that there are. full: those without room for more K/V. Mutates: the ring, where replicas changed."""
        if affinity.replica in loads:
            return affinity.replica
        if not affinity.keys and not affinity.owner:
            return ""
        limit = self.limit(loads)

        def is_free(name: str) -> bool:
            return loads.get(name, limit) < limit and name not in full

        return self._knowing(affinity.keys, is_free, loads) or self._next(affinity, is_free, loads)

    def record(self, affinity: Affinity, replica: str) -> None:
        """The replica has read that prompt. Mutates: what is remembered."""
        for key in affinity.keys:
            others = [name for name in self._holders.get(key, ()) if name != replica]
            self._holders[key] = (replica, *others[: _MAX_HOLDERS - 1])
            self._holders.move_to_end(key)
        while len(self._holders) > self._num_remembered:
            self._holders.popitem(last=False)

    def _knowing(self, keys: tuple[int, ...], is_free: Callable[[str], bool], loads: Mapping[str, int]) -> str:
        """The least loaded of those that know the longest beginning."""
        for key in reversed(keys):
            holders = [name for name in self._holders.get(key, ()) if is_free(name)]
            if holders:
                return min(holders, key=loads.__getitem__)
        return ""

    def _next(self, affinity: Affinity, is_free: Callable[[str], bool], loads: Mapping[str, int]) -> str:
        """The first on the ring with room. Where the beginning is new, its shortest part decides, so that others with the same beginning
        come to the same replica whichever router they meet; else the tenant."""
        if self._ring.names != loads.keys():
            self._ring = Ring(loads)
        place = affinity.keys[0] if affinity.keys else affinity.owner
        return next((name for name in self._ring.walk(place) if is_free(name)), "")


def _place(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
