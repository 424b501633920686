"""Who may call: API keys, compared in constant time, on every path but the probes and the page; and by which names. Denies by default,
also paths that do not exist.

ASGI layers in front of the routes. Puts the caller's tenant, which salts the prefix cache, into the request's state.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import error_response
from service.errors import AuthenticationError, HostError

# In the scope of a request that the server makes to itself; what comes over the wire can't put anything there.
INSIDER = "braid.insider"
PUBLIC_PATHS = frozenset({"/health", "/live", "/ready", "/ping"})
# The page's own files. They hold no data: what it shows comes from the routes, for which it asks the person for a key.
_PAGE = "/"
_ASSETS = "/static/"
# Pictures that were answered with a URL, under names that nobody can guess.
KEPT_PICTURES = "/v1/images/kept/"
_OWN_NAMES = ("localhost", "127.0.0.1", "::1")


def is_public(path: str) -> bool:
    """May anybody ask for it, with keys set? path: as the router sees it, percent signs decoded."""
    return path in PUBLIC_PATHS or path == _PAGE or path.startswith((_ASSETS, KEPT_PICTURES))


def hosts_to_accept(host: str, has_keys: bool, allowed: Iterable[str] = ()) -> tuple[str, ...]:
    """The names that a server on `host` answers to; none for any. allowed: what its settings say.

    On the loopback address and without keys, the one thing between a web page and the server is the browser's rule of the same origin. A
    page whose own name is made to mean 127.0.0.1 passes that rule, but its requests still carry its name.
    """
    allowed = tuple(allowed)
    if "*" in allowed or (not allowed and (has_keys or not _is_loopback(host))):
        return ()
    return tuple(map(_bare, (*allowed, *(() if allowed else (*_OWN_NAMES, host)))))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(_bare(host)).is_loopback
    except ValueError:
        return _bare(host) == "localhost"


def _bare(host: str) -> str:
    return host.lower().strip("[]").rstrip(".")


class HostCheck:
    """Lets a request through to `app` when it calls the server by one of its names. hosts: from `hosts_to_accept`."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self.app = app
        self.hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and INSIDER not in scope and not self._knows(Headers(scope=scope).getlist("host")):
            error = HostError("the server does not answer to the name in the Host header; --allowed-host adds one")
            await error_response(error, {"connection": "close"})(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _knows(self, given: list[str]) -> bool:
        """Without the header, as HTTP/1.0 allows, it was no browser."""
        return not self.hosts or all(_bare(_without_port(host)) in self.hosts for host in given)


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() and (":" not in name or name.endswith("]")) else host


class ApiKeys:
    """The keys as SHA-256 digests; the texts are not kept. None: everybody may call."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def tenant(self, headers: Headers) -> str:
        """The caller's tenant, "" when no keys are set. Raises: AuthenticationError."""
        if not self._digests:
            return ""
        authorizations = headers.getlist("authorization")
        given = {*headers.getlist("x-api-key"), *map(_bearer, authorizations)}
        # Some clients send one key in both headers; two different ones are a trick.
        found = self._find(given.pop()) if len(given) == 1 and len(authorizations) <= 1 else None
        if found is None:
            raise AuthenticationError("a valid API key is needed: send Authorization: Bearer KEY")
        return found

    def _find(self, given: str) -> str | None:
        """Looks at every key, so that the time tells nothing."""
        digest = hashlib.sha256(given.encode()).digest()
        found = None
        for known in self._digests:
            if hmac.compare_digest(digest, known):
                found = hashlib.sha256(known).hexdigest()
        return found


def _bearer(value: str) -> str:
    scheme, _, key = value.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def salted(tenant: str, cache_salt: str | None) -> str:
    """The tenant that a request's own salt makes of the caller's."""
    return tenant if cache_salt is None else hashlib.sha256(f"{tenant}\0{cache_salt}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Insider:
    """On whose behalf the server asks itself, and how much the request can wait; stands in the scope under INSIDER."""

    tenant: str
    priority: int


class KeyCheck:
    """Lets a request through to `app` when its path is public, its key is known, or the server asks itself."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if (insider := scope.get(INSIDER)) is not None:
                scope.setdefault("state", {}).update(tenant=insider.tenant, priority=insider.priority)
                await self.app(scope, receive, send)
                return
            try:
                tenant = "" if is_public(scope["path"]) else self.keys.tenant(Headers(scope=scope))
            except AuthenticationError as error:
                await error_response(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)
