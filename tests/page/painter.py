"""A server whose model sees and draws: the real app, before a scripted engine whose picture codes are control characters.

Codes have no text, so a script may say "Here: \\x01\\x02\\x03\\x04." and the answer has a picture there.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from PIL import Image

from service.engine.messages import Event, Picture
from service.engine.stream import Stream
from service.vocabulary import PictureIds
from tests.api.fakes import MODEL, ByteTokenizer, Running, Script
from tests.page.window import chatting

MARKS = PictureIds(first_code=1, num_codes=8, rows=2, columns=2, begin_id=0x0E, frame_id=0x0F, end_id=0x10)
SIDE = 32
DRAWN = "\x0e\x01\x02\x03\x04\x10"  # one picture, as the model writes it
SEEN = (5, 6, 7, 8)  # the codes of whatever it is shown
COLOUR = (200, 40, 40)


class SilentCodes(ByteTokenizer):
    def token_bytes(self, token: int, *, skip_special: bool = True) -> bytes:
        return (
            b""
            if MARKS.is_code(token) or token in (MARKS.begin_id, MARKS.end_id)
            else super().token_bytes(token, skip_special=skip_special)
        )


@contextlib.contextmanager
def painting(text: str = f"Here you are.{DRAWN}", **options: Any) -> Iterator[Running]:
    """text: of its answers."""
    with chatting(**options) as server:
        server.engine.script = Script(text=text)
        vars(server.codec).update(tokenizer=SilentCodes(), pictures=MARKS)
        info = server.engine.infos[MODEL]
        server.engine.infos[MODEL] = msgspec.structs.replace(info, pictures=MARKS, picture_pixels=SIDE // MARKS.rows)
        vars(server.engine).update(submit=_submit(server.engine.submit))
        yield server


def _submit(others: Callable[[Any], Stream[Any]]) -> Callable[[Any], Stream[Any]]:
    """others: takes what is no picture."""

    def submit(request: Any) -> Stream[Any]:
        if not isinstance(request, Picture):
            return others(request)
        stream = Stream(request, lambda *_: None)
        stream.push(Event(request.request_id, 0, [] if request.codes else list(SEEN), finish="stop", pixels=bytes(COLOUR) * SIDE * SIDE))
        return stream

    return submit


def picture_file(width: int, height: int, kind: str = "PNG", colour: tuple[int, int, int] = COLOUR) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, kind)
    return file.getvalue()


def picture_of(url: str) -> Image.Image:
    """What a data URL holds."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(";base64,")[2], validate=True)))
