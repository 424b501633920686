"""What travels between the gate and a replica: a request as it came, and the parts of an answer as they come.

Plain values, so that any transport can carry them; the rules of HTTP that a forwarder has to know. No network here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from service.deploy.affinity import Affinity

REPLICA_FIELD = "x-braid-replica"
"""Of an answer: who gave it. Of a request: who has to."""
Fields = tuple[tuple[bytes, bytes], ...]
# They concern one connection, not the message (RFC 9110, section 7.6.1); lengths are told anew by whoever sends.
_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding upgrade "
    b"content-length expect".split()
)


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A request. target: path and query as they came, percent signs and all. affinity: where it belongs."""

    method: str
    target: str
    fields: Fields
    body: bytes
    affinity: Affinity = field(default_factory=Affinity)

    @property
    def only(self) -> str:
        """The one replica that the client wants an answer from, "" for any."""
        return next((value.decode("latin-1") for name, value in self.fields if name == REPLICA_FIELD.encode()), "")


@dataclass(frozen=True, slots=True)
class Taken:
    """The first part: a replica has taken the request."""

    replica: str


@dataclass(frozen=True, slots=True)
class Head:
    """The second part; bytes of the body follow."""

    status: int
    fields: Fields


Part = Taken | Head | bytes


class LostError(Exception):
    """The replica is gone, or its server is, before the answer was whole."""


class Parts(Protocol):
    """The parts of one answer: Taken, Head, then bytes. Raises: LostError; OverloadedError in front of the first."""

    def __aiter__(self) -> AsyncIterator[Part]: ...

    async def __anext__(self) -> Part: ...

    def cancel(self) -> None:
        """Nobody wants the rest. After the end nothing happens."""


class Link(Protocol):
    """The way to the replicas."""

    def send(self, request: Forwarded) -> Parts: ...


def end_to_end(fields: Iterable[tuple[bytes, bytes]]) -> Fields:
    """The header fields that are for the other end."""
    fields = [(name.lower(), value) for name, value in fields]
    named = {each.strip().lower() for name, value in fields if name == b"connection" for each in value.split(b",")}
    return tuple((name, value) for name, value in fields if name not in _HOP and name not in named)
