"""The chat page at `/`: files that are read once and served with a policy under which they can run nothing but themselves.

No state and no template: what the page shows it fetches from the API. It holds no data, so it needs no key.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import PurePosixPath

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.errors import RouteNotFoundError

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cross-origin-opener-policy": "same-origin",
    # Always asked for again, and answered with 304 while it is the same.
    "cache-control": "no-cache",
}
_FOLDER = resources.files("service.api") / "static"


def page_router() -> APIRouter:
    """Raises: FileNotFoundError when the package was built without its page."""
    router = APIRouter()
    answers = {name: _Answer(name) for name in _names()}

    async def show_page(request: Request) -> Response:
        return answers["index.html"].to(request)

    async def show_asset(request: Request, name: str) -> Response:
        if name not in answers:
            raise RouteNotFoundError("there is no such path on this server")
        return answers[name].to(request)

    router.add_api_route("/", show_page, methods=["GET", "HEAD"])
    router.add_api_route("/static/{name:path}", show_asset, methods=["GET", "HEAD"])
    return router


def _names() -> list[str]:
    """The files of the page; the only names that its route knows, so that no path of a request is ever opened."""
    tops = [entry.name for entry in _FOLDER.iterdir() if entry.is_file()]
    vendored = [f"vendor/{entry.name}" for entry in (_FOLDER / "vendor").iterdir() if entry.is_file()]
    return [name for name in (*tops, *vendored) if PurePosixPath(name).suffix in _TYPES]


class _Answer:
    """One file in memory."""

    def __init__(self, name: str) -> None:
        self._body = _FOLDER.joinpath(*name.split("/")).read_bytes()
        self._tag = f'"{hashlib.sha256(self._body).hexdigest()[:16]}"'
        self._type = _TYPES[PurePosixPath(name).suffix]

    def to(self, request: Request) -> Response:
        headers = {**_HEADERS, "etag": self._tag}
        if request.headers.get("if-none-match") == self._tag:
            return Response(status_code=304, headers=headers)
        return Response(self._body, headers=headers, media_type=self._type)
