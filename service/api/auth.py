"""Who may call: API keys, compared in constant time, on every path but the probes. Denies by default, also paths that do not exist.

An ASGI layer in front of the routes. Puts the caller's tenant, which salts the prefix cache, into the request's state.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import error_response
from service.errors import AuthenticationError

PUBLIC_PATHS = frozenset({"/health", "/live", "/ready", "/ping"})


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


class KeyCheck:
    """Lets a request through to `app` when its path is public or its key is known."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                tenant = "" if scope["path"] in PUBLIC_PATHS else self.keys.tenant(Headers(scope=scope))
            except AuthenticationError as error:
                await error_response(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)
