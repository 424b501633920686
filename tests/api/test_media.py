"""Pictures that clients bring: data URLs and files, hosts that are listed and those that are not, redirects, sizes, and slow hosts.

Long: a test a way in which a URL, a host or a redirect can be wrong.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from PIL import Image

from service.api import media as media_module
from service.api.media import Media, MediaLimits
from service.codec.pixels import PictureLimits, Pixels
from service.errors import RequestError

HOST = "pictures.example"
PARAM = "messages[0].content[1]"
MAX_BYTES = 2000


def png(width: int = 4, height: int = 4, colour: tuple[int, int, int] = (10, 20, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


PICTURE = png()


def data_url(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(data).decode()


class Web:
    """All hosts there are. Answers by URL; keeps what was asked for."""

    def __init__(self, pages: dict[str, Callable[[], httpx.Response]] | None = None) -> None:
        self.pages = pages or {}
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        return self.pages.get(str(request.url), lambda: httpx.Response(404))()

    @property
    def urls(self) -> list[str]:
        return [str(request.url) for request in self.asked]


def media_of(web: Web | None = None, *hosts: str, max_bytes: int = MAX_BYTES, max_pixels: int = 10_000) -> Media:
    limits = MediaLimits(PictureLimits(max_bytes, max_pixels), hosts=hosts or (HOST,))
    return Media(limits, httpx.MockTransport(web or Web()))


def bytes_of(media: Media, source: str | bytes) -> bytes:
    return asyncio.run(media.bytes_of(source, PARAM))


def refused(media: Media, source: str | bytes, code: str | None = "invalid_image_url") -> str:
    with pytest.raises(RequestError) as caught:
        bytes_of(media, source)
    assert (caught.value.param, caught.value.code, caught.value.status) == (PARAM, code, 400)
    return caught.value.message


def page(data: bytes = PICTURE) -> Callable[[], httpx.Response]:
    return lambda: httpx.Response(200, content=data)


def leads_to(place: str, status: int = 302) -> Callable[[], httpx.Response]:
    return lambda: httpx.Response(status, headers={"location": place})


# -- data URLs and files


@pytest.mark.parametrize(
    "head", ["data:image/png;base64,", "DATA:IMAGE/PNG;BASE64,", "data:image/svg+xml;charset=utf-8;base64,", "data:image/x;base64,"]
)
def test_a_data_url_is_its_bytes_whatever_it_says_it_is(head: str) -> None:
    assert bytes_of(media_of(), data_url(b"anything", head)) == b"anything"


def test_a_file_is_its_bytes() -> None:
    assert bytes_of(media_of(), b"file:///etc/passwd") == b"file:///etc/passwd"


@pytest.mark.parametrize(
    "url",
    [
        "data:text/plain;base64,aGk=",
        "data:;base64,aGk=",
        "data:image/png,aGk=",
        "data:image/png;base64",
        "data:image/png;base64;aGk=",
        "data:image/png;base64x,aGk=",
        "data:image/png" + ";a=b" * 100 + ";base64,aGk=",
        "data:image/png;é;base64,aGk=",
        "data:",
    ],
)
def test_a_data_url_of_another_form_is_refused(url: str) -> None:
    assert "data:image/png;base64" in refused(media_of(), url)


@pytest.mark.parametrize("text", ["!!!!", "aGk", "aGk=\n", "aG k=", "aGk==", "aGké", "-_-_"])
def test_text_that_is_not_base64_is_refused(text: str) -> None:
    assert "base64" in refused(media_of(), "data:image/png;base64," + text, "invalid_base64_image")


def test_a_data_url_is_measured_before_it_is_read() -> None:
    exact = bytes(MAX_BYTES)
    assert bytes_of(media_of(), data_url(exact)) == exact
    assert str(MAX_BYTES) in refused(media_of(), "data:image/png;base64," + "!" * 4 * MAX_BYTES, "image_too_large")
    # What is only a little too large is refused where files are, too.
    for source in (data_url(bytes(MAX_BYTES + 1)), bytes(MAX_BYTES + 1)):
        with pytest.raises(RequestError) as caught:
            asyncio.run(media_of().pixels(source, (4, 4), PARAM))
        assert (caught.value.param, caught.value.code) == (PARAM, "image_too_large")


@pytest.mark.parametrize(
    "url", ["", "x", "file:///etc/passwd", "ftp://pictures.example/a", "//pictures.example/a", "https:/a", " https://a", "javascript:1"]
)
def test_other_kinds_of_url_are_refused(url: str) -> None:
    web = Web()
    refused(media_of(web), url)
    assert not web.asked


# -- pixels


def test_pixels_have_the_size_that_is_wanted() -> None:
    for source in (png(40, 20), data_url(png(40, 20)), f"https://{HOST}/a"):
        media = media_of(Web({f"https://{HOST}/a": page(png(40, 20))}))
        pixels = asyncio.run(media.pixels(source, (8, 12), PARAM))
        assert pixels == Pixels(8, 12, bytes((10, 20, 30)) * 96)


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"<svg/>", "invalid_image"), (PICTURE[:-20], "invalid_image"), (b"", "invalid_image"), (png(101, 100), "image_too_large")],
    ids=["svg", "cut short", "nothing", "too many pixels"],
)
def test_what_is_no_picture_is_named(data: bytes, code: str) -> None:
    for source in (data, data_url(data), f"https://{HOST}/a"):
        with pytest.raises(RequestError) as caught:
            asyncio.run(media_of(Web({f"https://{HOST}/a": page(data)})).pixels(source, (4, 4), PARAM))
        assert (caught.value.param, caught.value.code) == (PARAM, code)


def test_work_apart_is_in_another_thread_and_its_errors_are_named() -> None:
    media = media_of()

    def fail(error: Exception) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    assert asyncio.run(media.apart(threading.get_ident, PARAM)) != threading.get_ident()
    for given, named in ((None, PARAM), ("mask", "mask")):
        with pytest.raises(RequestError) as caught:
            asyncio.run(media.apart(fail(RequestError("no", param=given)), PARAM))
        assert caught.value.param == named
    with pytest.raises(MemoryError):
        asyncio.run(media.apart(fail(MemoryError()), PARAM))


# -- hosts


@pytest.mark.parametrize("url", [f"https://{HOST}/a?b=c", f"http://{HOST}/a", f"HTTPS://{HOST.upper()}/a", f"https://{HOST}:8443/a"])
def test_a_listed_host_is_asked(url: str) -> None:
    web = Web({str(httpx.URL(url)): page()})
    assert bytes_of(media_of(web), url) == PICTURE
    assert [request.method for request in web.asked] == ["GET"]
    assert not {"authorization", "cookie", "referer"} & set(web.asked[0].headers)


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example/a",
        f"https://sub.{HOST}/a",
        f"https://{HOST}.evil.example/a",
        f"https://evil.example/{HOST}",
        f"https://evil.example\\@{HOST}/a",
        f"https://{HOST}@evil.example/a",
        f"https://name:secret@{HOST}/a",
        f"https://@{HOST}/a",
        "http://127.0.0.1/a",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/a",
        "http://[::1/a",
        "http://localhost:8000/metrics",
        "https:///a",
        "https://",
        f"https://{HOST}/" + "a" * 4096,
    ],
)
def test_no_other_host_is_asked(url: str) -> None:
    web = Web()
    message = refused(media_of(web), url)
    assert not web.asked
    assert "secret" not in message


def test_who_is_refused_learns_what_is_allowed() -> None:
    assert f"{HOST}, more.example" in refused(media_of(None, HOST, "more.example"), "https://other.example/a")
    nobody = Media(MediaLimits(), httpx.MockTransport(Web()))
    assert "none" in refused(nobody, f"https://{HOST}/a")
    assert "data URL" in refused(nobody, f"https://{HOST}/a")


@pytest.mark.parametrize("status", [204, 304, 400, 403, 404, 500, 503, 302])
def test_only_a_whole_answer_is_taken(status: int) -> None:
    web = Web({f"https://{HOST}/a": lambda: httpx.Response(status, content=PICTURE if status != 204 else b"")})
    assert str(status) in refused(media_of(web), f"https://{HOST}/a")


# -- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_among_listed_hosts_are_followed(status: int) -> None:
    web = Web(
        {
            f"https://{HOST}/a": leads_to("/b?c", status),
            f"https://{HOST}/b?c": leads_to("//more.example/d", status),
            "https://more.example/d": page(),
        }
    )
    assert bytes_of(media_of(web, HOST, "more.example"), f"https://{HOST}/a") == PICTURE
    assert web.urls == [f"https://{HOST}/a", f"https://{HOST}/b?c", "https://more.example/d"]


@pytest.mark.parametrize(
    "place",
    [
        "http://127.0.0.1:8000/metrics",
        "http://169.254.169.254/latest/meta-data",
        "//evil.example/a",
        f"https://{HOST}@evil.example/a",
        "file:///etc/passwd",
        "ftp://pictures.example/a",
        data_url(PICTURE),
        "http://[::1",
        f"https://user@{HOST}/a",
    ],
)
def test_a_listed_host_that_leads_elsewhere_is_not_followed(place: str) -> None:
    web = Web({f"https://{HOST}/a": leads_to(place)})
    refused(media_of(web), f"https://{HOST}/a")
    assert web.urls == [f"https://{HOST}/a"]


def test_three_redirects_and_no_more() -> None:
    web = Web({f"https://{HOST}/{step}": leads_to(f"/{step + 1}") for step in range(10)})
    web.pages[f"https://{HOST}/10"] = page()
    assert bytes_of(media_of(web), f"https://{HOST}/7") == PICTURE
    web.asked.clear()
    assert "3" in refused(media_of(web), f"https://{HOST}/6")
    assert len(web.asked) == 4
    web.pages[f"https://{HOST}/0"] = leads_to("/0")
    web.asked.clear()
    refused(media_of(web), f"https://{HOST}/0")
    assert len(web.asked) == 4


# -- how much, and how long


class Pieces(httpx.AsyncByteStream):
    """A body in pieces; counts those that were read. pause_s: before each. closed: was it let go?"""

    def __init__(self, count: int, size: int, pause_s: float = 0.0) -> None:
        self.num_read = 0
        self.is_closed = False
        self._count, self._size, self._pause_s = count, size, pause_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self._count):
            await asyncio.sleep(self._pause_s)
            self.num_read += 1
            yield bytes(self._size)

    async def aclose(self) -> None:
        self.is_closed = True


def body(stream: httpx.AsyncByteStream, **headers: str) -> Web:
    return Web({f"https://{HOST}/a": lambda: httpx.Response(200, stream=stream, headers=headers)})


def test_a_body_of_as_many_bytes_as_may_be() -> None:
    assert bytes_of(media_of(body(Pieces(4, MAX_BYTES // 4))), f"https://{HOST}/a") == bytes(MAX_BYTES)


def test_a_larger_body_is_not_read_to_its_end() -> None:
    pieces = Pieces(1000, 500)
    assert str(MAX_BYTES) in refused(media_of(body(pieces)), f"https://{HOST}/a", "image_too_large")
    assert (pieces.num_read, pieces.is_closed) == (5, True)


def test_a_body_is_measured_unpacked() -> None:
    packed = gzip.compress(bytes(MAX_BYTES + 1))
    assert len(packed) < 100
    web = Web({f"https://{HOST}/a": lambda: httpx.Response(200, content=packed, headers={"content-encoding": "gzip"})})
    refused(media_of(web), f"https://{HOST}/a", "image_too_large")
    web.pages[f"https://{HOST}/a"] = lambda: httpx.Response(200, stream=Whole(b"no gzip"), headers={"content-encoding": "gzip"})
    refused(media_of(web), f"https://{HOST}/a")


class Whole(httpx.AsyncByteStream):
    def __init__(self, data: bytes) -> None:
        self._data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._data


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("refused by 10.0.0.7"),
        httpx.ConnectTimeout("10.0.0.7"),
        httpx.ReadTimeout("10.0.0.7"),
        httpx.ReadError("10.0.0.7"),
        httpx.RemoteProtocolError("10.0.0.7"),
        httpx.PoolTimeout("10.0.0.7"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_host_that_fails_is_the_pictures_fault_and_tells_nothing_else(error: httpx.HTTPError) -> None:
    def fail() -> Any:
        raise error

    message = refused(media_of(Web({f"https://{HOST}/a": fail})), f"https://{HOST}/a")
    assert message == "the picture could not be fetched"


def test_a_body_that_drips_does_not_hold_a_request_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece comes soon enough for a limit of one read; all of them do not."""
    monkeypatch.setattr(media_module, "_FETCH_S", 0.2)
    pieces = Pieces(1000, 1, pause_s=0.02)
    assert "fetched" in refused(media_of(body(pieces)), f"https://{HOST}/a")
    assert pieces.is_closed
    assert 1 <= pieces.num_read < 20


def test_time_counts_over_all_redirects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_module, "_FETCH_S", 0.2)

    async def slow(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.09)
        return leads_to("/next")()

    media = Media(MediaLimits(hosts=(HOST,)), httpx.MockTransport(slow))
    assert "fetched" in refused(media, f"https://{HOST}/a")
