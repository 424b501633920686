"""One replica: a Braid server in a child process, requests handed to it byte for byte, its health and its figures told on.

Knows nothing of how replicas are reached or found. Wrapped by `cluster` for Ray Serve; tests run it alone.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable

import httpx

from service.deploy.child import Child, Figure, Use, read_figures, use_of
from service.deploy.exchange import REPLICA_FIELD, Forwarded, Head, Part, Taken, end_to_end
from service.errors import NotFoundError

_PROBE_S = 5.0
Publish = Callable[[Iterable[Figure]], None]


class Replica:
    """name: unique among replicas, ever. publish: gets the server's figures whenever it was looked at. key: one of the server's, where it
    has keys; without it the figures stay unknown."""

    def __init__(self, name: str, child: Child, publish: Publish, key: str = "") -> None:
        self.name = name
        self.use = Use()
        self.num_looks = 0
        self._child = child
        self._publish = publish
        self._fields = {"authorization": f"Bearer {key}"} if key else {}
        self._client: httpx.AsyncClient | None = None

    async def forward(self, request: Forwarded) -> AsyncIterator[Part]:
        """Yields who has taken it, the head, and the body as it comes. Closing the generator ends the request in the server.
        Raises: httpx.HTTPError where the server is gone."""
        yield Taken(self.name)
        if request.only not in ("", self.name):
            yield Head(404, ((b"content-type", b"application/json"),))
            error = NotFoundError(f"There is no replica {request.only[:64]!r}.", param=REPLICA_FIELD)
            yield json.dumps(error.body()).encode()
            return
        async with self._http().stream(
            request.method, self._child.url + request.target, headers=list(request.fields), content=request.body or None
        ) as answer:
            yield Head(answer.status_code, end_to_end(answer.headers.raw))
            async for data in answer.aiter_raw():
                yield data

    async def look(self) -> None:
        """Reads the server's health and figures. Raises: RuntimeError where it is not well: dead, stuck or still loading."""
        try:
            health = await self._http().get(f"{self._child.url}/health", timeout=_PROBE_S)
            page = await self._http().get(f"{self._child.url}/metrics", headers=self._fields, timeout=_PROBE_S)
        except httpx.HTTPError as error:
            raise RuntimeError(f"the server of replica {self.name} does not answer: {type(error).__name__}") from None
        if health.status_code != 200:
            raise RuntimeError(f"the server of replica {self.name} is not well: {health.text[:200]}")
        if page.status_code == 200:
            figures = list(read_figures(page.text))
            self.use = use_of(figures)
            self.num_looks += 1
            self._publish(figures)

    def end(self) -> None:
        self._child.end()

    async def close(self) -> None:
        """Its connections; the server goes on."""
        if self._client is not None:
            await self._client.aclose()

    def _http(self) -> httpx.AsyncClient:
        """Made where it is used: a client belongs to one event loop. Answers take as long as they take."""
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            self._client = httpx.AsyncClient(timeout=httpx.Timeout(None, connect=_PROBE_S), limits=limits, trust_env=False)
        return self._client
