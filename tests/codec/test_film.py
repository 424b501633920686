"""Films, decoded back: every frame is there, for its time, with its pixels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from service.codec.film import FILM_TYPES, FilmKind, encode_film
from service.codec.pixels import Pixels


def moving(count: int, height: int = 48, width: int = 64) -> list[Pixels]:
    """A bright square that walks over a gradient."""
    y, x = np.mgrid[0:height, 0:width]
    frames = []
    for index in range(count):
        array = np.stack([y * 255 // height, x * 255 // width, np.full_like(x, 40)], -1).astype(np.uint8)
        array[8:24, 4 * index : 4 * index + 16] = (250, 240, 30)
        frames.append(Pixels.from_array(array))
    return frames


def plain(count: int) -> list[Pixels]:
    """Few colours: squares on one ground, other ones in each frame."""
    frames = []
    for index in range(count):
        array = np.full((20, 30, 3), (200, 30, 60), np.uint8)
        array[index : index + 6, 2 * index : 2 * index + 6] = (index * 20, 255 - index, 7)
        array[-1, -1] = (0, 0, 0)
        frames.append(Pixels.from_array(array))
    return frames


def shown(data: bytes) -> tuple[list[NDArray[np.uint8]], list[int]]:
    """Frames of an animated picture and their times in ms."""
    with Image.open(io.BytesIO(data)) as image:
        pairs = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]
    return [array for array, _ in pairs], [round(ms) for _, ms in pairs]


def played(data: bytes) -> tuple[list[NDArray[np.uint8]], list[float], float, str]:
    """Frames of a video, their starts in s, its length in s, and its codec."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(video=0))
        assert stream.duration is not None
        assert stream.time_base is not None
        arrays = [frame.to_ndarray(format="rgb24") for frame in frames]
        return arrays, [float(frame.time or 0) for frame in frames], float(stream.duration * stream.time_base), stream.codec_context.name


def mean_errors(decoded: Sequence[NDArray[np.uint8]], frames: Sequence[Pixels]) -> list[float]:
    return [float(np.abs(array.astype(int) - frame.array).mean()) for array, frame in zip(decoded, frames, strict=True)]


@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
@pytest.mark.parametrize("frame_s", [0.5, 0.1, 1 / 30, 1001 / 30000, 0.0123456789, 2.25, 10.0])
def test_mp4(frame_s: float, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if codec == "mpeg4":
        monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    elif "libx264" not in av.codecs_available:
        pytest.skip("this build has no encoder for H.264")
    frames = moving(6)
    decoded, starts, length, name = played(encode_film(frames, frame_s, "mp4"))
    assert name == codec
    assert starts == pytest.approx([index * frame_s for index in range(6)], rel=1e-3, abs=1e-3)
    assert length == pytest.approx(6 * frame_s, rel=1e-3, abs=1e-3)
    # Of neighbours 10 and more: each frame is the one it should be.
    assert max(mean_errors(decoded, frames)) < 4


def test_mp4_has_the_colours_of_the_source() -> None:
    """Wrong matrix or range would be off by 10 and more in one of them."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128)]
    frames = [Pixels.from_array(np.full((32, 32, 3), colour, np.uint8)) for colour in colours]
    data = encode_film(frames, 0.5, "mp4")
    decoded, *_ = played(data)
    assert [np.abs(array.astype(int) - frame.array).max() <= 4 for array, frame in zip(decoded, frames, strict=True)] == [True] * 6
    with av.open(io.BytesIO(data)) as container:
        context = container.streams.video[0].codec_context
        assert (context.pix_fmt, context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (
            "yuv420p",
            1,
            1,
            1,
            1,
        )


@pytest.mark.parametrize("size", [(32, 32), (240, 320)])
def test_mp4_has_its_index_in_front(size: tuple[int, int]) -> None:
    """Also where the pixels are more than any buffer, so that they had to be moved piece by piece."""
    noise = np.random.default_rng(0)
    frames = [Pixels.from_array(noise.integers(0, 256, (*size, 3), np.uint8)) for _ in range(8)]
    data = encode_film(frames, 0.2, "mp4")
    assert data[4:8] == b"ftyp"
    assert data.index(b"moov") < data.index(b"mdat")
    assert len(data) > size[0] * size[1]
    decoded, *_ = played(data)
    assert len(decoded) == 8
    # 4:2:0 blurs the colours of noise by itself; another frame's noise would be off by 85.
    assert max(mean_errors(decoded, frames)) < 60


def test_mp4_of_an_odd_size_is_refused() -> None:
    for height, width in ((31, 32), (32, 31)):
        with pytest.raises(ValueError, match="even sizes"):
            encode_film(moving(2, height, width), 0.5, "mp4")


def test_webp_keeps_every_pixel() -> None:
    frames = moving(5)
    decoded, times = shown(encode_film(frames, 0.25, "webp"))
    assert times == [250] * 5
    assert mean_errors(decoded, frames) == [0] * 5


def test_gif_keeps_every_pixel_of_few_colours() -> None:
    frames = plain(7)
    decoded, times = shown(encode_film(frames, 0.25, "gif"))
    assert times == [250] * 7
    assert mean_errors(decoded, frames) == [0] * 7


def test_gif_keeps_256_colours() -> None:
    """All that a palette holds: none is left over for what did not change."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(3):
        colours = rng.choice(2**24, 256, replace=False)
        array = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], -1).astype(np.uint8)
        frames.append(Pixels.from_array(array.reshape(16, 16, 3)))
    decoded, _ = shown(encode_film(frames, 0.1, "gif"))
    assert mean_errors(decoded, frames) == [0] * 3


def test_gif_of_many_colours_comes_near() -> None:
    frames = moving(4)
    decoded, times = shown(encode_film(frames, 0.1, "gif"))
    assert times == [100] * 4
    assert max(mean_errors(decoded, frames)) < 8


def test_times_add_up() -> None:
    """A third of a second can't be said in whole units; the film is as long as it should be all the same."""
    for kind, unit in (("webp", 1), ("gif", 10)):
        _, times = shown(encode_film(plain(9), 1 / 3, kind))
        assert sum(times) == pytest.approx(3000, abs=unit / 2)
        assert max(times) - min(times) <= unit


def test_a_gif_is_never_faster_than_browsers_show() -> None:
    assert shown(encode_film(plain(4), 0.005, "gif"))[1] == [20] * 4


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_equal_frames_are_one_that_lasts(kind: FilmKind) -> None:
    first, second = plain(2)
    decoded, times = shown(encode_film([first, first, second, second, second, first], 0.1, kind))
    assert times == [200, 300, 100]
    assert mean_errors(decoded, [first, second, first]) == [0] * 3


def test_equal_frames_of_a_video_are_all_there() -> None:
    _, starts, length, _ = played(encode_film(plain(1) * 5, 0.2, "mp4"))
    assert [later - earlier for earlier, later in pairwise(starts)] == pytest.approx([0.2] * 4, abs=1e-3)
    assert length == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", FILM_TYPES)
def test_a_film_of_one_frame(kind: FilmKind) -> None:
    frames = plain(1)
    data = encode_film(frames, 0.5, kind)
    decoded = played(data)[0] if kind == "mp4" else [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))]
    assert max(mean_errors(decoded, frames)) < 8


@pytest.mark.parametrize("kind", FILM_TYPES)
def test_the_same_frames_are_the_same_bytes(kind: FilmKind) -> None:
    assert encode_film(moving(3), 0.1, kind) == encode_film(moving(3), 0.1, kind)


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_animations_loop_and_say_what_they_are(kind: FilmKind) -> None:
    with Image.open(io.BytesIO(encode_film(plain(3), 0.1, kind))) as image:
        assert image.info["loop"] == 0
        assert image.get_format_mimetype() == FILM_TYPES[kind]


@pytest.mark.parametrize("kind", FILM_TYPES)
def test_what_is_no_film_is_refused(kind: FilmKind) -> None:
    with pytest.raises(ValueError, match="at least one"):
        encode_film([], 0.1, kind)
    with pytest.raises(ValueError, match="one size"):
        encode_film([*moving(1), *plain(1)], 0.1, kind)
    for frame_s in (0, -1, 0.0009, 601, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds"):
            encode_film(plain(1), frame_s, kind)
    with pytest.raises(ValueError, match="at most 600"):
        encode_film(plain(1) * 100, 7, kind)


@pytest.mark.parametrize("kind", FILM_TYPES)
def test_the_longest_film(kind: FilmKind) -> None:
    assert encode_film(plain(1) * 10, 60, kind)
