"""Finished pictures in a row → the bytes of one film: MP4, animated WEBP or GIF.

Reads nothing that a client sent and resizes nothing. Blocks, for seconds where frames are many, so call it in a thread. Called by the API.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

from PIL import Image

from service.codec.pixels import Pixels, picture_image

FilmKind = Literal["mp4", "webp", "gif"]

FILM_TYPES: Mapping[str, str] = MappingProxyType({"mp4": "video/mp4", "webp": "image/webp", "gif": "image/gif"})

# One thread, so that the bytes do not depend on the number of cores.
_CODEC_OPTIONS = {
    # Constant quality, where lower is better: 18 looks like the source.
    "libx264": {"crf": "18", "preset": "medium", "threads": "1"},
    # The quantiser, 2 (best) to 31, times 118, which is how the library counts it.
    "mpeg4": {"flags": "+qscale", "global_quality": str(2 * 118), "threads": "1"},
}
# The colours of HD video in the limited range, said in the file: players guess otherwise, by the size.
_BT709, _LIMITED = 1, 1
# MPEG-4 writes its clock in 16 bits.
_MAX_CLOCK_HZ = 60_000
_MIN_FRAME_S = 0.001
# A GIF can't say that a frame lasts longer than 655 s, as many equal ones would.
_MAX_FILM_S = 600
# Browsers show a GIF's frame that lasts less for 100 ms.
_MIN_GIF_CS = 2


def encode_film(frames: Sequence[Pixels], frame_s: float, kind: FilmKind) -> bytes:
    """frames, all of one size, for frame_s seconds each. WEBP and GIF are shown again and again; WEBP keeps every pixel, GIF where a
    frame has at most 256 colours. In both, frames that follow their equal become one that lasts longer.

    Raises: ValueError for no frames, different sizes, frames of less than 1 ms, more than ten minutes, and an odd size as MP4.
    """
    if not frames:
        raise ValueError("a film has at least one frame")
    if len({(frame.height, frame.width) for frame in frames}) > 1:
        raise ValueError("the frames of a film have one size")
    if not _MIN_FRAME_S <= frame_s <= _MAX_FILM_S / len(frames):
        raise ValueError(f"a frame is shown for {_MIN_FRAME_S} seconds or more, a film for at most {_MAX_FILM_S}")
    return {"mp4": _mp4, "webp": _webp, "gif": _gif}[kind](frames, frame_s)


def _mp4(frames: Sequence[Pixels], frame_s: float) -> bytes:
    """H.264, or MPEG-4 where the library has no encoder for it, with the index in front, so that it plays while it loads."""
    import av  # many megabytes of codecs, for a rare request

    height, width = frames[0].height, frames[0].width
    if height % 2 or width % 2:
        raise ValueError(f"an MP4 has even sizes, not {height} × {width}")
    period = Fraction(frame_s).limit_denominator(_MAX_CLOCK_HZ)
    codec: Literal["libx264", "mpeg4"] = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    file = io.BytesIO()
    # To put the index in front, the library opens the file a second time and reads what it wrote.
    with av.open(file, "w", format="mp4", options={"movflags": "faststart"}, io_open=lambda *_: _SecondReader(file)) as container:
        stream = container.add_stream(codec, rate=1 / period, options=_CODEC_OPTIONS[codec])
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.colorspace = stream.color_primaries = stream.color_trc = _BT709
        for index, frame in enumerate(frames):
            rgb = av.VideoFrame.from_ndarray(frame.array, "rgb24")
            picture = rgb.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
            picture.pts, picture.time_base = index, period
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue()


class _SecondReader:
    """Reads a file from its beginning while another writes to it, whose place stays as it was."""

    def __init__(self, file: io.BytesIO) -> None:
        self._file = file
        self._at = 0

    def read(self, size: int) -> bytes:
        writers_place = self._file.tell()
        self._file.seek(self._at)
        data = self._file.read(size)
        self._at += len(data)
        self._file.seek(writers_place)
        return data

    def close(self) -> None:
        pass


def _webp(frames: Sequence[Pixels], frame_s: float) -> bytes:
    return _animation([picture_image(frame) for frame in frames], "WEBP", _durations(len(frames), frame_s * 1000), lossless=True)


def _gif(frames: Sequence[Pixels], frame_s: float) -> bytes:
    # By median cut: colours that are few enough all become their own.
    images = [picture_image(frame).quantize(256) for frame in frames]
    hundredths = _durations(len(frames), max(frame_s * 100, _MIN_GIF_CS))
    return _animation(images, "GIF", [10 * each for each in hundredths])


def _animation(images: Sequence[Image.Image], form: str, durations_ms: Sequence[int], **options: bool) -> bytes:
    file = io.BytesIO()
    images[0].save(file, form, save_all=True, append_images=images[1:], duration=durations_ms, loop=0, **options)
    return file.getvalue()


def _durations(count: int, each: float) -> list[int]:
    """Whole ones, none further from its place than half a unit: rounded one by one, a film would run away."""
    ends = [math.floor(index * each + 0.5) for index in range(count + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def film_kinds() -> tuple[FilmKind, ...]:
    """Those that this installation can make, the usual one first."""
    return ("mp4", "webp", "gif") if importlib.util.find_spec("av") is not None else ("webp", "gif")
