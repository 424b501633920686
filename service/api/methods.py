"""HEAD, answered as GET without the body, on every route that takes GET.

An ASGI layer in front of the routes, so that none of them has to know.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadAsGet:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_bare(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        inner = {**scope, "method": "GET"}
        await self.app(inner, receive, send_bare)
        # The layers in front count by route.
        scope["route"] = inner.get("route")


def with_head(allowed: str) -> str:
    """What an Allow header says, with HEAD where there is GET."""
    methods = [method.strip() for method in allowed.split(",") if method.strip()]
    return ", ".join([*methods, "HEAD"] if "GET" in methods and "HEAD" not in methods else methods)
