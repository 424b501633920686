"""The layers in front of the routes, outermost first: envelope, origins, host names, keys, HEAD. One list for the app and for what answers
before it.

Called by the composition root.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from service.api.auth import ApiKeys, HostCheck, KeyCheck
from service.api.envelope import Envelope
from service.api.methods import HeadAsGet
from service.metrics import Metrics


def make_layers(
    metrics: Metrics, *, api_keys: Sequence[str] = (), allow_origins: Sequence[str] = (), hosts: Sequence[str] = ()
) -> list[Middleware]:
    """api_keys: none lets everybody in. allow_origins: none sends no CORS headers. hosts: the names that the server answers to; none for
    any."""
    origins = Middleware(
        CORSMiddleware,
        allow_origins=list(allow_origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "x-braid-warnings", "openai-processing-ms", "retry-after"],
    )
    return [
        Middleware(Envelope, metrics=metrics),
        *([origins] if allow_origins else []),
        Middleware(HostCheck, hosts=hosts),
        Middleware(KeyCheck, keys=ApiKeys(api_keys)),
        Middleware(HeadAsGet),
    ]


def behind(layers: Sequence[Middleware], app: ASGIApp) -> ASGIApp:
    """The app with the layers around it."""
    for cls, arguments, keywords in reversed(layers):
        app = cls(app, *arguments, **keywords)
    return app
