"""Pictures that clients bring: as data URLs, as uploads, or from hosts that the operator lists; within limits, decoded in one place.

No ids and no engine: what comes out are pixels of the size that a model's pictures have. Called by the chat and picture routes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urljoin, urlsplit

import numpy as np
from numpy.typing import NDArray

from service.api.body import BodyRoom
from service.codec.pixels import PictureLimits, Pixels, decode_mask, decode_picture, fitted
from service.errors import RequestError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
_DATA_URL = re.compile(r"data:([\w.+/-]*)((?:;[\w=.+-]*)*),", re.ASCII | re.IGNORECASE)
_MAX_URL = 4096
_MAX_REDIRECTS = 3
_FETCH_S = 20.0
MAX_HELD_BYTES = 256 * 2**20
"""Of all pictures that wait to be decoded: a body's own share is given back when it has been parsed."""
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """max_count: pictures of one request. hosts: names that pictures may be fetched from; none for none."""

    picture: PictureLimits = field(default_factory=PictureLimits)
    max_count: int = 16
    hosts: tuple[str, ...] = ()


class Media:
    def __init__(self, limits: MediaLimits | None = None, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.limits = limits or MediaLimits()
        self._transport = transport
        self._room = BodyRoom(MAX_HELD_BYTES)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="pixels")

    async def pixels(self, source: str | bytes, size: tuple[int, int], param: str) -> Pixels:
        """A picture from a URL or a file's bytes, cut and resampled to size (height, width). Raises: RequestError naming param;
        OverloadedError when too many bytes of pictures are held at once."""
        return await self._decoded(source, lambda data: fitted(decode_picture(data, self.limits.picture), *size), param)

    async def mask(self, source: str | bytes, param: str) -> NDArray[np.bool_]:
        """Where a mask, from a URL or a file's bytes, is transparent: bool [Y, X]. Raises: as `pixels`."""
        return await self._decoded(source, lambda data: decode_mask(data, self.limits.picture), param)

    async def _decoded(self, source: str | bytes, decode: Callable[[bytes], T], param: str) -> T:
        with self._room.share() as share:
            share.grow(len(source))
            data = await self.bytes_of(source, param)
            share.grow(len(data))
            return await self.apart(lambda: decode(data), param)

    async def apart(self, work: Callable[[], T], param: str) -> T:
        """Runs work on pixels in another thread. Raises: what work raises, its RequestErrors with the param."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except RequestError as error:
            error.param = error.param or param
            raise

    async def bytes_of(self, source: str | bytes, param: str) -> bytes:
        """Of a file. Raises: RequestError naming param."""
        if isinstance(source, bytes):
            return source
        if source[:5].lower() == "data:":
            return await self.apart(lambda: self._from_data_url(source, param), param)
        if source[:7].lower() == "http://" or source[:8].lower() == "https://":
            return await self._fetched(source, param)
        raise _url_error("a picture's URL must begin with data:image/ or https://", param)

    def _from_data_url(self, url: str, param: str) -> bytes:
        head = _DATA_URL.match(url[:256])
        if head is None or not head[1].lower().startswith("image/") or not head[2].lower().endswith(";base64"):
            raise _url_error("a picture's data URL has the form data:image/png;base64,...", param)
        if (len(url) - head.end()) * 3 // 4 > self.limits.picture.max_bytes + 3:
            raise RequestError(f"a picture may have {self.limits.picture.max_bytes} bytes at most", param=param, code="image_too_large")
        try:
            return base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise RequestError("the picture is not valid base64", param=param, code="invalid_base64_image") from None

    async def _fetched(self, url: str, param: str) -> bytes:
        import httpx  # rarely needed, and a tenth of all that the server imports at start

        async with httpx.AsyncClient(transport=self._transport, timeout=_FETCH_S, follow_redirects=False) as client:
            try:
                async with asyncio.timeout(_FETCH_S):
                    for _ in range(_MAX_REDIRECTS + 1):
                        self._check_host(url, param)
                        found = await self._get(client, url, param)
                        if isinstance(found, bytes):
                            return found
                        url = found
            except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError):
                raise _url_error("the picture could not be fetched", param) from None
        raise _url_error(f"the picture's URL leads on more than {_MAX_REDIRECTS} times", param)

    def _check_host(self, url: str, param: str) -> None:
        """Every step of a redirect is looked at: a listed host must not lead into a network that only this server sees."""
        parts = urlsplit(url)
        if len(url) > _MAX_URL or parts.scheme not in ("http", "https") or parts.username is not None:
            raise _url_error(f"a picture's URL is http or https, without a user, of at most {_MAX_URL} characters", param)
        if (parts.hostname or "") not in self.limits.hosts:
            allowed = f"this server fetches from {', '.join(self.limits.hosts)} alone" if self.limits.hosts else "this server fetches none"
            raise _url_error(f"pictures of {parts.hostname or 'no host'} can't be fetched: {allowed}; send a data URL", param)

    async def _get(self, client: httpx.AsyncClient, url: str, param: str) -> bytes | str:
        """The bytes, or where they are instead."""
        most = self.limits.picture.max_bytes
        async with client.stream("GET", url) as answer:
            if answer.status_code in _REDIRECTS and "location" in answer.headers:
                return urljoin(url, answer.headers["location"])
            if answer.status_code != 200:
                raise _url_error(f"the picture's host answered with status {answer.status_code}", param)
            data = bytearray()
            async for piece in answer.aiter_bytes():
                data += piece
                if len(data) > most:
                    raise RequestError(f"a picture may have {most} bytes at most", param=param, code="image_too_large")
        return bytes(data)


def _url_error(text: str, param: str) -> RequestError:
    return RequestError(text, param=param, code="invalid_image_url")
