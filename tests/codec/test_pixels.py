"""Pictures of clients: every mode becomes the right pixels, and whatever the bytes are, nothing but a RequestError comes out.

Long: a test a promise, for each format, mode and way in which a file can lie.
"""

from __future__ import annotations

import contextlib
import io
import struct
import time
import zlib
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from service.codec import pixels as pixels_module
from service.codec.pixels import (
    MEDIA_TYPES,
    PictureKind,
    PictureLimits,
    Pixels,
    decode_mask,
    decode_picture,
    encode_picture,
    fitted,
)
from service.errors import RequestError

LIMITS = PictureLimits()
LOSSLESS = ("PNG", "BMP", "WEBP", "GIF")


def noise(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels), np.uint8)


def smooth(height: int, width: int) -> Pixels:
    y, x = np.mgrid[0:height, 0:width]
    return Pixels.from_array(np.stack([y * 255 // height, x * 255 // width, (x + y) * 255 // (height + width)], -1).astype(np.uint8))


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, colour_type: int, rows: Iterable[bytes], *others: bytes) -> bytes:
    """Written by the specification, so that what Pillow writes is not its only judge."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(others) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def exif(orientation: int, order: str = ">") -> bytes:
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    other = struct.pack(order + "HHII", 0x0100, 4, 1, 7)
    magic = b"MM\0*" if order == ">" else b"II*\0"
    return b"Exif\0\0" + magic + struct.pack(order + "IH", 8, 2) + other + entry + b"\0\0\0\0"


def refusal(data: bytes, limits: PictureLimits = LIMITS, decode: Callable[[bytes, PictureLimits], object] = decode_picture) -> RequestError:
    with pytest.raises(RequestError) as caught:
        decode(data, limits)
    assert caught.value.param is None
    assert caught.value.code in ("invalid_image", "image_too_large")
    return caught.value


# The formats and their modes


@pytest.mark.parametrize("form", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_keep_every_pixel(form: str) -> None:
    source = noise(5, 7)
    decoded = decode_picture(saved(Image.fromarray(source), form, **({"lossless": True} if form == "WEBP" else {})), LIMITS)
    assert (decoded.height, decoded.width) == (5, 7)
    np.testing.assert_array_equal(decoded.array, source)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
def test_jpeg_comes_near(options: dict[str, object]) -> None:
    source = smooth(40, 56)
    decoded = decode_picture(saved(Image.fromarray(source.array), "JPEG", quality=95, **options), LIMITS)
    assert (decoded.height, decoded.width) == (40, 56)
    assert np.abs(decoded.array.astype(int) - source.array).mean() < 2


def test_lossy_webp_comes_near() -> None:
    source = smooth(40, 56)
    decoded = decode_picture(saved(Image.fromarray(source.array), "WEBP", quality=95), LIMITS)
    assert np.abs(decoded.array.astype(int) - source.array).mean() < 3


@pytest.mark.parametrize("form", ["PNG", "BMP"])
@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_modes_of_few_colours(form: str, mode: str) -> None:
    image = Image.fromarray(noise(9, 11)).convert(mode)
    np.testing.assert_array_equal(decode_picture(saved(image, form), LIMITS).array, np.asarray(image.convert("RGB")))


def test_grey_and_cmyk_jpegs() -> None:
    grey = Image.fromarray(smooth(16, 24).array).convert("L")
    decoded = decode_picture(saved(grey, "JPEG", quality=100), LIMITS).array.astype(int)
    assert np.abs(decoded - np.asarray(grey)[..., None]).max() <= 2
    ink = Image.new("CMYK", (16, 8), (0, 255, 255, 0))
    assert np.abs(decode_picture(saved(ink, "JPEG", quality=100), LIMITS).array.astype(int) - [255, 0, 0]).max() <= 4


def test_a_jpeg_in_rgb() -> None:
    """Adobe's segment alone says so, where the components are numbered as those of YCbCr."""
    data = saved(Image.new("RGB", (16, 16), (200, 100, 20)), "JPEG", quality=100, keep_rgb=True)
    assert b"Adobe" in data
    for sampling in (b"\x11\0", b"\0"):
        names = [letter + sampling for letter in (b"R", b"G", b"B")]
        assert b"".join(names) in data
        data = data.replace(b"".join(names), b"".join(bytes([number]) + sampling for number in (1, 2, 3)))
    assert np.abs(decode_picture(data, LIMITS).array.astype(int) - [200, 100, 20]).max() <= 2


@pytest.mark.parametrize(("depth", "colour_type", "row", "expected"), [
    (16, 0, struct.pack(">3H", 0x0000, 0x80FF, 0xFFFF), [[0] * 3, [0x80] * 3, [255] * 3]),
    (16, 2, struct.pack(">6H", 0xFFFF, 0x0102, 0, 0, 0x7F00, 0xFF00), [[255, 1, 0], [0, 0x7F, 255]]),
    (4, 0, bytes([0x0F, 0x30]), [[0] * 3, [255] * 3, [51] * 3]),
    (2, 0, bytes([0b00_01_10_11]), [[0] * 3, [85] * 3, [170] * 3, [255] * 3]),
    (1, 0, bytes([0b0110_0000]), [[0] * 3, [255] * 3, [255] * 3]),
])  # fmt: skip
def test_depths_of_png(depth: int, colour_type: int, row: bytes, expected: list[list[int]]) -> None:
    assert decode_picture(png(len(expected), 1, depth, colour_type, [row]), LIMITS).array.tolist() == [expected]


def test_interlaced_png() -> None:
    source = Image.fromarray(noise(8, 8))
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(b"\0" + row.tobytes() for y, x, down, right in passes for row in np.asarray(source)[y::down, x::right])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 1))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode_picture(data, LIMITS).array, np.asarray(source))


def test_png_in_many_chunks() -> None:
    source = noise(20, 20)
    whole = saved(Image.fromarray(source), "PNG")
    start = whole.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", whole, start)
    body = whole[start + 8 : start + 8 + length]
    parts = b"".join(chunk(b"IDAT", body[at : at + 10]) + chunk(b"IDAT", b"") for at in range(0, length, 10))
    np.testing.assert_array_equal(decode_picture(whole[:start] + parts + chunk(b"IEND", b""), LIMITS).array, source)


def test_bottom_up_and_top_down_bmp() -> None:
    source = noise(3, 4)
    rows = [row[:, ::-1].tobytes() for row in source]
    for height, lines in ((3, rows[::-1]), (-3, rows)):
        header = struct.pack("<2sIII", b"BM", 54 + 36, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 4, height, 1, 24, 0, 36, 0, 0, 0, 0)
        np.testing.assert_array_equal(decode_picture(header + b"".join(lines), LIMITS).array, source)


def test_old_and_transparent_bmp() -> None:
    core = struct.pack("<2sIII", b"BM", 34, 0, 26) + struct.pack("<IHHHH", 12, 2, 1, 1, 24)
    assert decode_picture(core + bytes([1, 2, 3, 4, 5, 6, 0, 0]), LIMITS).array.tolist() == [[[3, 2, 1], [6, 5, 4]]]
    data = saved(Image.new("RGBA", (2, 2), (10, 20, 30, 0)), "BMP")
    assert decode_picture(data, LIMITS, background=(1, 2, 3)).height == 2


def test_run_length_bmp_is_refused() -> None:
    header = struct.pack("<2sIII", b"BM", 58, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 8, 1, 4, 0, 0, 1, 0)
    assert "BMP" in refusal(header + bytes(4) + b"\x02\x00\x00\x01").message


def test_animations_are_their_first_frame() -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    for form, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = saved(frames[0], form, save_all=True, append_images=frames[1:], duration=50, **options)
        assert (decode_picture(data, LIMITS).array == (255, 0, 0)).all(), form


def gif(screen: tuple[int, int], box: tuple[int, int, int, int], before: bytes = b"") -> bytes:
    """Red and blue, a frame of index 1 everywhere."""
    pixels = saved(Image.new("P", box[2:], 1), "GIF", optimize=False)
    data = pixels[pixels.index(b",") + 10 :]
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", *screen, 0x80, 0, 0)
        + bytes([255, 0, 0, 0, 0, 255])
        + before
        + b","
        + struct.pack("<4HB", *box, 0)
        + data
    )


def test_a_gifs_frame_on_its_screen() -> None:
    clear = b"!\xf9\x04\x01\0\0\0\0"  # index 0 is transparent
    decoded = decode_picture(gif((4, 3), (1, 1, 2, 1), b"!\xfe\x02hi\0" + clear), LIMITS, background=(9, 8, 7)).array
    expected = np.full((3, 4, 3), (9, 8, 7))
    expected[1, 1:3] = (0, 0, 255)
    np.testing.assert_array_equal(decoded, expected)
    enlarged_screen = decode_picture(gif((2, 2), (1, 1, 3, 4)), LIMITS)
    assert (enlarged_screen.height, enlarged_screen.width) == (5, 4)


# Transparency


def test_alpha_is_laid_over_the_background() -> None:
    source = np.dstack([noise(6, 6), np.linspace(0, 255, 36).astype(np.uint8).reshape(6, 6)])
    alpha = source[..., 3:].astype(float) / 255
    for background in ((255, 255, 255), (10, 200, 30)):
        expected = source[..., :3] * alpha + np.array(background) * (1 - alpha)
        for form, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
            decoded = decode_picture(saved(Image.fromarray(source), form, **options), LIMITS, background=background)
            assert np.abs(decoded.array - expected).max() <= 1, form


def test_grey_with_alpha() -> None:
    rows = [bytes([100, 255, 100, 0])]
    assert decode_picture(png(2, 1, 8, 4, rows), LIMITS).array.tolist() == [[[100] * 3, [255] * 3]]
    deep = [struct.pack(">4H", 0x6400, 0xFFFF, 0x6400, 0)]
    assert decode_picture(png(2, 1, 16, 4, deep), LIMITS, background=(1, 2, 3)).array.tolist() == [[[100] * 3, [1, 2, 3]]]


PALETTE = chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255]))
KEYED = [
    pytest.param(png(3, 1, 8, 3, [bytes([0, 1, 2])], PALETTE, chunk(b"tRNS", bytes([255, 0]))), 1, id="palette, one clear"),
    pytest.param(png(3, 1, 8, 3, [bytes([0, 1, 2])], PALETTE, chunk(b"tRNS", bytes([254, 0, 255]))), 1, id="palette, alphas"),
    pytest.param(png(2, 1, 8, 2, [bytes([1, 2, 3, 1, 2, 4])], chunk(b"tRNS", struct.pack(">3H", 1, 2, 4))), 1, id="RGB"),
    pytest.param(png(2, 1, 8, 0, [bytes([7, 8])], chunk(b"tRNS", struct.pack(">H", 8))), 1, id="grey"),
    pytest.param(png(4, 1, 2, 0, [bytes([0b00_01_10_11])], chunk(b"tRNS", struct.pack(">H", 2))), 2, id="grey of 2 bits"),
    pytest.param(png(2, 1, 4, 0, [bytes([0x1E])], chunk(b"tRNS", struct.pack(">H", 14))), 1, id="grey of 4 bits"),
    pytest.param(png(2, 1, 1, 0, [bytes([0b01_000000])], chunk(b"tRNS", struct.pack(">H", 1))), 1, id="grey of 1 bit"),
    pytest.param(png(2, 1, 16, 0, [struct.pack(">2H", 0x1234, 0x1235)], chunk(b"tRNS", struct.pack(">H", 0x1235))), 1, id="I;16"),
    pytest.param(
        png(2, 1, 16, 2, [struct.pack(">6H", 0x1234, 0, 0, 0xFF34, 0, 0)], chunk(b"tRNS", struct.pack(">3H", 0xFF34, 0, 0))), 1, id="RGB;16"
    ),
    pytest.param(saved(Image.fromarray(np.array([[[9, 9, 9, 255], [9, 9, 9, 0]]], np.uint8)), "PNG"), 1, id="RGBA"),
    pytest.param(saved(Image.fromarray(np.array([[[9, 9, 9, 255], [9, 9, 9, 0]]], np.uint8)), "WEBP", lossless=True), 1, id="webp"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "clear"), KEYED)
def test_one_transparent_colour(data: bytes, clear: int) -> None:
    """The mask is True there alone, and there alone the background shows."""
    mask = decode_mask(data, LIMITS)
    assert mask.dtype == np.bool_
    assert [index for index, redrawn in enumerate(mask[0]) if redrawn] == [clear]
    black, white = (decode_picture(data, LIMITS, background=(value,) * 3).array[0].astype(int) for value in (0, 255))
    assert [index for index, difference in enumerate(white - black) if (difference == 255).all()] == [clear]
    assert [index for index, difference in enumerate(white - black) if difference.max() > 1] == [clear]


def test_a_mask_counts_only_what_is_fully_transparent() -> None:
    alpha = np.array([[0, 1, 128], [255, 0, 254]], np.uint8)
    image = Image.fromarray(np.dstack([noise(2, 3), alpha]))
    assert decode_mask(saved(image, "PNG"), LIMITS).tolist() == [[True, False, False], [False, True, False]]
    assert decode_mask(png(2, 1, 8, 4, [bytes([0, 255, 0, 0])]), LIMITS).tolist() == [[False, True]]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF"])
def test_a_mask_needs_alpha(form: str) -> None:
    error = refusal(saved(Image.new("L", (4, 4)), form), decode=decode_mask)
    assert error.code == "invalid_image"
    assert "alpha channel" in error.message


# Orientation


def turned(array: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """By the standard's words: where row 0 and column 0 of the stored picture are shown."""
    return {
        1: array,
        2: array[:, ::-1],  # top, right
        3: array[::-1, ::-1],  # bottom, right
        4: array[::-1],  # bottom, left
        5: array.swapaxes(0, 1),  # left, top
        6: array.swapaxes(0, 1)[:, ::-1],  # right, top
        7: array.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
        8: array.swapaxes(0, 1)[::-1],  # left, bottom
    }[orientation]


@pytest.mark.parametrize("order", [">", "<"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int, order: str) -> None:
    source = noise(3, 5)
    block = exif(orientation, order)
    chunks = [chunk(b"eXIf", block[6:])]
    files = {
        "png": png(5, 3, 8, 2, [row.tobytes() for row in source], *chunks),
        "webp": saved(Image.fromarray(source), "WEBP", lossless=True, exif=block),
    }
    for kind, data in files.items():
        np.testing.assert_array_equal(decode_picture(data, LIMITS).array, turned(source, orientation), err_msg=kind)
    stored = np.asarray(Image.open(io.BytesIO(saved(Image.fromarray(source), "JPEG", quality=95))))
    data = saved(Image.fromarray(source), "JPEG", quality=95, exif=block)
    np.testing.assert_array_equal(decode_picture(data, LIMITS).array, turned(stored, orientation))


def test_masks_turn_with_their_pictures() -> None:
    alpha = np.array([[0, 255, 255]], np.uint8)
    data = saved(Image.fromarray(np.dstack([noise(1, 3), alpha])), "PNG", exif=exif(6))
    assert decode_mask(data, LIMITS).tolist() == [[True], [False], [False]]


@pytest.mark.parametrize("block", [
    exif(0), exif(9), exif(0xFFFF), exif(6)[:20], b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff",
    b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(50),
])  # fmt: skip
def test_damaged_orientation_says_nothing(block: bytes) -> None:
    source = noise(3, 5)
    data = png(5, 3, 8, 2, [row.tobytes() for row in source], chunk(b"eXIf", block[6:]))
    np.testing.assert_array_equal(decode_picture(data, LIMITS).array, source)


@pytest.mark.filterwarnings("error")
def test_strange_exif_warns_of_nothing() -> None:
    """Pillow warns once an entry, in numbers of the client's, and the interpreter never forgets a warning."""
    entries = b"".join(struct.pack("<HHII", tag, 2, 60_000 + tag, 60_000) for tag in range(1, 1000))
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 999) + entries
    data = saved(Image.new("RGB", (4, 4)), "JPEG", exif=block)
    assert block in data
    assert decode_picture(data, LIMITS).width == 4


# Refusals


def bmp_header(width: int, height: int) -> bytes:
    return struct.pack("<2sIII", b"BM", 100, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def webp_header(width: int, height: int) -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


VP8L = b"RIFF\x20\0\0\0WEBPVP8L\x14\0\0\0\x2f" + struct.pack("<I", 16382 | 16382 << 14) + bytes(40)
VP8 = b"RIFF\x20\0\0\0WEBPVP8 \x14\0\0\0\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383) + bytes(40)
SOF = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 65535, 65535, 3) + bytes(9)
BOMBS = {
    "png": png(100_000, 100_000, 8, 2, [b"x"]),
    "png, only a header": png(100_000, 100_000, 8, 2, [b"x"])[:40],
    "png, past 2**31 in all": png(2**31 - 1, 2**31 - 1, 16, 6, [b"x"]),
    "png, where Pillow only warns": png(10_000, 10_000, 8, 2, [b"x"]),
    "jpeg": SOF + b"\xff\xda\x00\x08\x01\x01\0\0\x3f\0\xff\xd9",
    "gif": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;",
    "gif, by its frame": b"GIF89a\1\0\1\0\0\0\0," + struct.pack("<4H", 9, 9, 10_000, 10_000) + b"\0\x02\x02D\x01\0;",
    "bmp": bmp_header(100_000, 100_000),
    "bmp, top down": bmp_header(100_000, -100_000),
    "webp, extended": webp_header(2**14, 2**14),
    "webp, past what may be allocated": webp_header(2**24, 2**24),
    "webp, lossless": VP8L,
    "webp, lossy": VP8,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_header(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any decoder sees them, so that nothing is allocated: no opening of a file here would get this far."""
    monkeypatch.setattr(pixels_module, "_FORMATS", tuple(each._replace(opens=None) for each in pixels_module._FORMATS))
    started = time.process_time()
    error = refusal(BOMBS[name])
    assert time.process_time() - started < 0.5
    assert error.code == "image_too_large"
    assert f"{LIMITS.max_pixels:,}" in error.message


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_limits_are_exact(form: str) -> None:
    data = saved(Image.fromarray(noise(10, 12)), form)
    just = PictureLimits(max_bytes=len(data), max_pixels=120)
    assert decode_picture(data, just).width == 12
    assert refusal(data, PictureLimits(max_bytes=len(data) - 1)).code == "image_too_large"
    assert refusal(data, PictureLimits(max_pixels=119)).code == "image_too_large"


def test_limits_may_exceed_pillows() -> None:
    """180 million pixels, where Pillow refuses, of which nothing but the header is there."""
    error = refusal(png(18_000, 10_000, 8, 2, [b"x"]), PictureLimits(max_pixels=200_000_000))
    assert error.code == "invalid_image"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_truncation_is_refused(form: str) -> None:
    data = saved(Image.fromarray(noise(9, 8)), form)
    assert decode_picture(data, LIMITS).width == 8
    # What a GIF has after its pixels is not read: the end of the blocks and the trailer.
    for length in range(len(data) - {"GIF": 4}.get(form, 0)):
        assert refusal(data[:length]).code == "invalid_image", length


@pytest.mark.parametrize(("part", "offset"), [(b"IHDR", 13), (b"PLTE", 4), (b"IDAT", 100), (b"IEND", 4)])
def test_damage_in_a_png_is_noticed(part: bytes, offset: int) -> None:
    data = bytearray(saved(Image.fromarray(noise(30, 30)).convert("P"), "PNG"))
    data[data.index(part) + offset] ^= 1
    assert refusal(bytes(data)).code == "invalid_image"


def test_a_size_that_pillow_reads_otherwise_is_refused() -> None:
    """33 million rows from top to bottom, which Pillow takes for four thousand million from bottom to top."""
    assert refusal(bmp_header(1, -0x200_0000)).code == "invalid_image"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_both_readings_of_a_header_agree(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a way found to make ours see less than Pillow's, the limit would hold still."""
    data = saved(Image.fromarray(noise(9, 8)), form)
    formats = [each._replace(pare=lambda data, _: pixels_module._Pared(1, 1, data)) for each in pixels_module._FORMATS]
    monkeypatch.setattr(pixels_module, "_FORMATS", tuple(formats))
    assert refusal(data).code == "invalid_image"


@pytest.mark.parametrize("data", [
    b"", b"\0", b"hello", b"BM", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"RIFF\0\0\0\0WEBPVP8X",
    b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script>alert(1)</script></svg>",
    b"<?xml version='1.0'?><!DOCTYPE svg [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><svg>&a;</svg>",
    b"%PDF-1.7 ...", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"P6 1 1 255\n\0\0\0",
    saved(Image.new("RGB", (4, 4)), "TIFF"), saved(Image.new("RGB", (4, 4)), "ICO"), saved(Image.new("RGB", (4, 4)), "TGA"),
    np.random.default_rng(0).bytes(5000),
    png(0, 4, 8, 2, []), png(4, 0, 8, 2, []), bmp_header(0, 5),
    png(1, 1, 3, 2, [b"\0" * 3]), png(1, 1, 8, 5, [b"\0" * 3]),
    b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", b"") + chunk(b"IEND", b""),
    b"\x89PNG\r\n\x1a\n" + chunk(b"aaAa", struct.pack(">II", 1, 1)) + png(1, 1, 8, 2, [b"abc"])[8:],
])  # fmt: skip
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    error = refusal(data)
    assert error.code == "invalid_image"
    assert not any(word in error.message for word in ("PIL", "Pillow", "BytesIO", "/", "0x", "Error"))


def test_a_refusal_says_which_formats_are_taken() -> None:
    assert all(name in refusal(b"<svg/>").message for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP"))


def test_text_chunks_change_nothing() -> None:
    """Pillow puts them beside what it decodes with, by a name that the client chose."""
    info = PngImagePlugin.PngInfo()
    for key in ("transparency", "bbox", "interlace", "icc_profile", "default_image", "Raw profile type exif"):
        info.add_text(key, "1")
    info.add_text("bomb", "x" * 5_000_000, zip=True)
    source = noise(4, 4)
    data = saved(Image.fromarray(source), "PNG", pnginfo=info)
    np.testing.assert_array_equal(decode_picture(data, LIMITS).array, source)


def scans(number: int) -> bytes:
    data = saved(Image.fromarray(noise(16, 16)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * number + b"\xff\xd9"


def test_scans_of_a_jpeg_are_bounded() -> None:
    assert decode_picture(scans(50), LIMITS).width == 16
    assert refusal(scans(200)).code == "invalid_image"


@pytest.mark.parametrize("data", [
    b"\xff\xd8" + b"\xff" * 20_000_000,
    b"\xff\xd8\xff" + b"\0" * 20_000_000,
    b"\xff\xd8" + b"\xff\xe2\0\x02" * 5_000_000,
    b"\xff\xd8" + b"\xff\xdb\0\x02" * 5_000_000,
    b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1x" * 9_000_000,
    b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\0" * 6_000_000,
    png(1, 1, 8, 2, [b"abc"])[:33] + chunk(b"IDAT", b"") * 1_500_000,
    webp_header(9, 9) + b"ALPH\0\0\0\0" * 2_500_000,
], ids=lambda data: f"{data[:3]!r} {data[-4:]!r}")  # fmt: skip
def test_files_of_many_empty_parts_take_no_time(data: bytes) -> None:
    started = time.process_time()
    refusal(data)
    assert time.process_time() - started < 2  # without bounds several of them take more


# Whatever the bytes are

SMALL = Image.fromarray(noise(12, 10, 4))
SEEDS = [
    saved(SMALL, "PNG", exif=exif(6)), saved(SMALL, "WEBP", lossless=True, exif=exif(3)), saved(SMALL, "WEBP", quality=50),
    saved(SMALL.convert("RGB"), "JPEG", exif=exif(8)), saved(SMALL.convert("RGB"), "JPEG", progressive=True),
    saved(SMALL.convert("CMYK"), "JPEG"), saved(SMALL, "BMP"),
    saved(SMALL.convert("P"), "GIF", save_all=True, append_images=[SMALL.convert("L")], comment="hello", duration=20),
    saved(SMALL.convert("P"), "BMP"), saved(SMALL.convert("1"), "BMP"), saved(SMALL.convert("P"), "PNG"), VP8, VP8L,
    saved(SMALL, "PNG", save_all=True, append_images=[SMALL.convert("L")]), *(param.values[0] for param in KEYED),
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, min(len(data), 80)) | st.integers(0, len(data)))
        match draw(st.sampled_from("wwwidc")):
            case "w":
                patch = draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"]))
                data[at : at + len(patch)] = patch
            case "i":
                data[at:at] = draw(st.binary(max_size=20))
            case "d":
                del data[at : at + draw(st.integers(1, 20))]
            case _:
                del data[at:]
    return with_checksums(bytes(data)) if draw(st.booleans()) else bytes(data)


def with_checksums(data: bytes) -> bytes:
    """A PNG whose damage its checksums don't show, as far as its chunks can be followed."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    at, parts = 8, [data[:8]]
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            break
        parts.append(chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join([*parts, data[at:]])


@pytest.mark.filterwarnings("error")
@settings(max_examples=800, deadline=None)
@given(
    st.binary(max_size=200) | mutated() | st.builds(bytes.__add__, st.sampled_from([each[:20] for each in SEEDS]), st.binary(max_size=200))
)
def test_nothing_but_a_request_error_escapes(data: bytes) -> None:
    limits = PictureLimits(max_bytes=100_000, max_pixels=100_000)
    for decode in (decode_picture, decode_mask):
        with contextlib.suppress(RequestError):
            decoded = decode(data, limits)
            array = decoded.array if isinstance(decoded, Pixels) else decoded
            assert 1 <= array.shape[0] * array.shape[1] <= limits.max_pixels


# Sizes


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 64), (33, 200), (10, 12)])
@pytest.mark.parametrize("source", [(10, 12), (100, 30), (30, 100), (1, 50), (50, 1), (1, 1)])
def test_sizes_are_exact(source: tuple[int, int], size: tuple[int, int]) -> None:
    pixels = Pixels.from_array(noise(*source))
    resized = fitted(pixels, *size)
    assert (resized.height, resized.width) == size


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_one_colour_stays_that_colour(source_height: int, source_width: int, height: int, width: int) -> None:
    pixels = Pixels(source_height, source_width, bytes([10, 200, 33]) * (source_height * source_width))
    assert (fitted(pixels, height, width).array == (10, 200, 33)).all()


def test_the_same_size_is_the_same_bytes() -> None:
    pixels = Pixels.from_array(noise(9, 14))
    assert fitted(pixels, 9, 14) == pixels


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [
    (10, 20, slice(0, 10), slice(5, 25)),
    (10, 21, slice(0, 10), slice(4, 25)),
])  # fmt: skip
def test_fitted_cuts_around_the_centre(height: int, width: int, rows: slice, columns: slice) -> None:
    """Where nothing is resampled, no pixel changes."""
    source = noise(10, 30)
    np.testing.assert_array_equal(fitted(Pixels.from_array(source), height, width).array, source[rows, columns])
    upright = source.swapaxes(0, 1)
    np.testing.assert_array_equal(fitted(Pixels.from_array(upright), width, height).array, upright[columns, rows])


def test_fitted_keeps_the_shape_of_things() -> None:
    """A square on a wide picture is a square still, in the middle; what lies outside of the cut is nowhere."""
    wide = np.zeros((60, 180, 3), np.uint8)
    wide[:, :50] = wide[:, 130:] = (255, 0, 0)
    wide[20:40, 80:100] = 255
    small = fitted(Pixels.from_array(wide), 30, 30).array.astype(int)
    is_square = small[..., 1] > 127
    assert is_square[10:20, 10:20].all()
    assert is_square.sum() == 100
    assert (small[..., 0] - small[..., 1]).max() < 30  # no red


def test_shrinking_averages() -> None:
    """Lanczos over a fine chequerboard is grey; picking single pixels would be black or white."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    small = fitted(Pixels.from_array(np.dstack([board] * 3).astype(np.uint8)), 8, 8).array.astype(int)
    assert np.abs(small - 127).max() < 12


def test_enlarging_is_smooth_and_true() -> None:
    pixels = smooth(16, 16)
    large = fitted(pixels, 64, 64)
    back = fitted(large, 16, 16)
    assert np.abs(back.array.astype(int) - pixels.array).mean() < 2
    steps = np.abs(np.diff(large.array.astype(int), axis=0)).max()
    assert steps < np.abs(np.diff(pixels.array.astype(int), axis=0)).max()  # no blocks


# Writing


@pytest.mark.parametrize(("kind", "quality"), [("png", 95), ("png", 1), ("webp", 100)])
def test_lossless_round_trips(kind: PictureKind, quality: int) -> None:
    pixels = Pixels.from_array(noise(17, 23))
    assert decode_picture(encode_picture(pixels, kind, quality), LIMITS) == pixels


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_lossy_round_trips_get_better_with_quality(kind: PictureKind) -> None:
    pixels = smooth(64, 48)
    files = [encode_picture(pixels, kind, quality) for quality in (0, 30, 95)]
    errors = [np.abs(decode_picture(file, LIMITS).array.astype(int) - pixels.array).mean() for file in files]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 2.5
    assert len(files[0]) < len(files[2])


@pytest.mark.parametrize("kind", MEDIA_TYPES)
def test_files_say_what_they_are_and_no_more(kind: PictureKind) -> None:
    pixels = smooth(8, 8)
    data = encode_picture(pixels, kind)
    assert data == encode_picture(pixels, kind)
    with Image.open(io.BytesIO(data)) as image:
        assert image.get_format_mimetype() == MEDIA_TYPES[kind]
        assert not image.getexif()
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density", "loop", "background", "timestamp", "duration"}


def test_colours_of_a_fine_jpeg_are_not_halved() -> None:
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2] = (255, 0, 0)
    stripes[:, 1::2] = (0, 0, 255)
    pixels = Pixels.from_array(stripes)
    errors = {q: np.abs(decode_picture(encode_picture(pixels, "jpeg", q), LIMITS).array.astype(int) - stripes).mean() for q in (89, 90)}
    assert errors[90] < 15
    assert errors[89] > 2 * errors[90]


# Pixels


def test_pixels_and_arrays() -> None:
    source = noise(3, 4)
    pixels = Pixels.from_array(source)
    assert (pixels.height, pixels.width, pixels.data) == (3, 4, source.tobytes())
    np.testing.assert_array_equal(pixels.array, source)
    np.testing.assert_array_equal(Pixels.from_array(source[:, ::-1]).array, source[:, ::-1])
    assert not pixels.array.flags.writeable


@pytest.mark.parametrize("array", [np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2), np.uint8), np.zeros((2, 2, 3), np.float32)])
def test_other_arrays_are_refused(array: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[Y, X, 3\]"):
        Pixels.from_array(array)


@pytest.mark.parametrize(("height", "width", "num_bytes"), [(2, 2, 11), (0, 2, 0), (2, 0, 0), (-1, -1, 3)])
def test_pixels_have_their_bytes(height: int, width: int, num_bytes: int) -> None:
    with pytest.raises(ValueError, match="no RGB picture"):
        Pixels(height, width, bytes(num_bytes))
