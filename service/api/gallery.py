"""Pictures that are answered with a URL: kept in memory for an hour under a name that nobody can guess, the oldest first to go.

No disk and no engine. Filled by the picture routes; its own route needs no key, because the name is one.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import APIRouter
from starlette.responses import Response

from service.api.auth import KEPT_PICTURES
from service.errors import NotFoundError

LIFETIME_S = 3600.0
MAX_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True)
class Kept:
    data: bytes
    media_type: str
    expires_at: float


class Gallery:
    def __init__(self, *, max_bytes: int = MAX_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._num_bytes = 0
        self._max_bytes = max_bytes
        self._clock = clock

    def keep(self, data: bytes, media_type: str) -> str:
        """The path that it can be fetched by. Mutates: the gallery, which may forget older ones."""
        name = secrets.token_urlsafe(24)
        self._kept[name] = Kept(data, media_type, self._clock() + LIFETIME_S)
        self._num_bytes += len(data)
        self._forget()
        return KEPT_PICTURES + name

    def find(self, name: str) -> Kept:
        """Raises: NotFoundError."""
        self._forget()
        if name not in self._kept:
            raise NotFoundError("there is no picture of this name, or its time is over")
        return self._kept[name]

    def _forget(self) -> None:
        while self._kept:
            name, oldest = next(iter(self._kept.items()))
            is_crowded = self._num_bytes > self._max_bytes and len(self._kept) > 1
            if oldest.expires_at > self._clock() and not is_crowded:
                return
            self._num_bytes -= len(oldest.data)
            del self._kept[name]


def gallery_router(gallery: Gallery) -> APIRouter:
    """Raises, when called: NotFoundError."""
    router = APIRouter(redirect_slashes=False)

    @router.get(KEPT_PICTURES + "{name}")
    async def show_kept_picture(name: str) -> Response:
        kept = gallery.find(name)
        headers = {"x-content-type-options": "nosniff", "cache-control": "private, max-age=3600"}
        return Response(kept.data, media_type=kept.media_type, headers=headers)

    return router
