"""Bytes of picture files ↔ RGB pixels: the one decoder for pictures that clients send, and what resizes and writes ours.

No torch, no HTTP, no ids; nothing here is fetched or executed. Everything blocks, so call it in a thread. Colour profiles are ignored,
animations are their first frame. Called by the API and by film. Long, because nothing else of ours may open a picture's file.

Pillow decodes, but never sees a file as it came. A reader per format first walks over its parts: it learns the size before anything is
allocated, and keeps what makes pixels. Text, profiles, EXIF and later frames are where Pillow parses at length, warns with numbers that a
client chose (the interpreter remembers each such warning for good), or unpacks; an orientation is read here. The classes of its plugins
are used directly, because Image.open warns by its own limit and a warning can't be silenced in one thread only.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from service.errors import RequestError

PictureKind = Literal["png", "jpeg", "webp"]
Colour = tuple[int, int, int]

MEDIA_TYPES: Mapping[str, str] = MappingProxyType({"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"})
WHITE: Colour = (255, 255, 255)

# No program writes more parts than this; files of nothing but empty ones would cost seconds for the bytes of one picture.
_MAX_PARTS = 100_000
# Each scan of a progressive JPEG passes over the whole picture for a few bytes of file. Encoders write about ten.
_MAX_SCANS = 100
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """What one picture of a client may have."""

    max_bytes: int = 20 * 2**20
    max_pixels: int = 36_000_000


@dataclass(frozen=True, slots=True)
class Pixels:
    """A picture in RGB, row by row, one byte a colour."""

    height: int
    width: int
    data: bytes

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1 or len(self.data) != self.height * self.width * 3:
            raise ValueError(f"{len(self.data)} bytes are no RGB picture of {self.height} rows and {self.width} columns")

    @property
    def array(self) -> NDArray[np.uint8]:
        """uint8 [Y, X, 3], read-only, the same memory."""
        return np.frombuffer(self.data, np.uint8).reshape(self.height, self.width, 3)

    @classmethod
    def from_array(cls, array: NDArray[np.uint8]) -> Pixels:
        """array: uint8 [Y, X, 3]."""
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"{array.dtype} {array.shape} is not uint8 [Y, X, 3]")
        return cls(array.shape[0], array.shape[1], array.tobytes())


def decode_picture(data: bytes, limits: PictureLimits, *, background: Colour = WHITE) -> Pixels:
    """A PNG, JPEG, WEBP, GIF or BMP as RGB, upright, with the background where it is transparent.

    Raises: RequestError (invalid_image, image_too_large) without a param.
    """
    with _decoded(data, limits) as (image, orientation):
        return _pixels(_upright(_on_background(_eight_bit(image), background), orientation))


def decode_mask(data: bytes, limits: PictureLimits) -> NDArray[np.bool_]:
    """An edit's mask, bool [Y, X]: True, where it is fully transparent, is to be drawn anew.

    Raises: RequestError (invalid_image, image_too_large) without a param, also for a picture that can't be transparent.
    """
    with _decoded(data, limits) as (image, orientation):
        image = _eight_bit(image)
        if not image.has_transparency_data:
            raise _invalid("a mask needs an alpha channel: it is redrawn where it is fully transparent")
        alpha = _upright(image.convert("RGBA").getchannel("A"), orientation)
        is_clear: NDArray[np.bool_] = np.asarray(alpha) == 0
        return is_clear


def fitted(pixels: Pixels, height: int, width: int) -> Pixels:
    """Exactly this size: cut to its shape around the centre, then resampled. What has the size already keeps every byte."""
    if pixels.width * height >= pixels.height * width:
        box_height, box_width = float(pixels.height), pixels.height * width / height
    else:
        box_height, box_width = pixels.width * height / width, float(pixels.width)
    top, left = (pixels.height - box_height) / 2, (pixels.width - box_width) / 2
    if (box_height, box_width) == (height, width):  # only cut: half a pixel of offset would blur
        return Pixels.from_array(pixels.array[int(top) : int(top) + height, int(left) : int(left) + width])
    return _resampled(pixels, height, width, (left, top, pixels.width - left, pixels.height - top))


def encode_picture(pixels: Pixels, kind: PictureKind, quality: int = 95) -> bytes:
    """A file without metadata, the same bytes for the same pixels. quality: 0 to 100, for jpeg and webp; a webp of 100 is lossless."""
    options: dict[str, dict[str, object]] = {
        "png": {"compress_level": 6},
        # From 90 on, colours at full resolution: who asks for that much would see their edges.
        "jpeg": {"quality": quality, "subsampling": 0 if quality >= 90 else 2},
        "webp": {"lossless": True, "quality": 80} if quality == 100 else {"quality": quality},
    }
    file = io.BytesIO()
    picture_image(pixels).save(file, kind.upper(), **options[kind])
    return file.getvalue()


def picture_image(pixels: Pixels) -> Image.Image:
    """The same pixels as Pillow's image."""
    return Image.frombytes("RGB", (pixels.width, pixels.height), pixels.data)


def _pixels(image: Image.Image) -> Pixels:
    return Pixels(image.height, image.width, image.tobytes())


def _resampled(pixels: Pixels, height: int, width: int, box: tuple[float, float, float, float]) -> Pixels:
    return _pixels(picture_image(pixels).resize((width, height), Image.Resampling.LANCZOS, box))


class _Pared(NamedTuple):
    """A file without what makes no pixels."""

    width: int
    height: int
    file: bytes
    exif: bytes = b""


@contextmanager
def _decoded(data: bytes, limits: PictureLimits) -> Iterator[tuple[Image.Image, int]]:
    """The image in its own mode, its pixels loaded, and its orientation (1 to 8). What goes wrong with it inside is the file's fault;
    a lack of memory is not, and passes."""
    if len(data) > limits.max_bytes:
        raise _too_large(f"the picture has {len(data):,} bytes; at most {limits.max_bytes:,} are taken")
    found = next((each for each in _FORMATS if each.magic.match(data)), None)
    if found is None:
        raise _invalid(f"not a picture of a format that is read here: {', '.join(each.name for each in _FORMATS)}")
    try:
        pared = found.pare(data, limits)
        image = found.opens(io.BytesIO(pared.file))
        if image.size != (pared.width, pared.height):
            raise ValueError("two readings of one header")
        image.load()
        yield image, _orientation(pared.exif)
    except (RequestError, MemoryError):
        raise
    except Exception:
        raise _invalid(f"the {found.name} file is damaged, cut short, or of a kind that is not read here") from None


def _invalid(message: str) -> RequestError:
    return RequestError(message, code="invalid_image")


def _too_large(message: str) -> RequestError:
    return RequestError(message, code="image_too_large")


def _check_size(width: int, height: int, limits: PictureLimits) -> None:
    if width < 1 or height < 1:
        raise _invalid("the picture has no pixels")
    if width * height > limits.max_pixels:
        raise _too_large(f"the picture has {width:,} × {height:,} pixels; at most {limits.max_pixels:,} in all are taken")


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit greys as L or LA, by their high byte as Pillow does with colours; anything else as it is."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    alpha = np.where(values == image.info["transparency"], np.uint8(0), np.uint8(255))
    return Image.merge("LA", (grey, Image.fromarray(alpha)))


def _on_background(image: Image.Image, background: Colour) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    colours = image.convert("RGBA")
    flat = Image.new("RGB", image.size, background)
    flat.paste(colours, mask=colours)
    return flat


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _orientation(exif: bytes) -> int:
    """1 where damaged EXIF says nothing. Source: TIFF 6.0, section 2."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, at)
            if tag == _ORIENTATION_TAG:
                return int(value)
    except struct.error:
        pass
    return 1


def _pare_png(data: bytes, limits: PictureLimits) -> _Pared:
    """IHDR, PLTE, tRNS and one IDAT, each checksum compared, as new ones are written. Source: PNG, third edition, 5."""
    kept: dict[bytes, bytes] = {}
    pixels: list[memoryview] = []
    view, at = memoryview(data), 8
    width = height = 0
    for _ in range(_MAX_PARTS):
        length, name = struct.unpack_from(">I4s", data, at)
        body, at = view[at + 8 : at + 8 + length], at + 12 + length
        if not kept:
            if name != b"IHDR":
                raise ValueError("no header")
            width, height = struct.unpack_from(">II", body)
            _check_size(width, height, limits)
        if struct.unpack_from(">I", data, at - 4)[0] != zlib.crc32(body, zlib.crc32(name)):
            raise ValueError("checksum")
        if name == b"IDAT":
            pixels.append(body)
        elif name == b"IEND":
            break
        else:
            kept.setdefault(name, bytes(body))
    else:
        raise ValueError("too many parts")
    header = kept[b"IHDR"]
    chunks = [(b"IHDR", header)]
    if b"PLTE" in kept:
        chunks.append((b"PLTE", kept[b"PLTE"]))
    if b"tRNS" in kept:
        chunks.append((b"tRNS", _eight_bit_key(kept[b"tRNS"], depth=header[8], colour_type=header[9])))
    chunks += [(b"IDAT", b"".join(pixels)), (b"IEND", b"")]
    file = b"".join(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks)
    return _Pared(width, height, data[:8] + file, kept.get(b"eXIf", b""))


def _eight_bit_key(key: bytes, depth: int, colour_type: int) -> bytes:
    """The transparent colour of a picture without palette, in the eight bits to which Pillow brings the pixels but not this."""
    if colour_type == 0 and depth < 8:
        return struct.pack(">H", (int.from_bytes(key[:2]) & (1 << depth) - 1) * (255 // ((1 << depth) - 1)))
    if colour_type == 2 and depth == 16:
        return struct.pack(">3H", *(value >> 8 for value in struct.unpack_from(">3H", key)))
    return key


# A marker is 0xFF and a byte other than 0 (a stuffed 0xFF) and 0xFF (fill).
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JPEG_LONE = {0x01, *range(0xD0, 0xD9)}
_JPEG_END, _JPEG_SCAN = 0xD9, 0xDA
# Of the application's segments and comments, those that say how colours are stored: JFIF and Adobe.
_JPEG_DROPPED = {*range(0xE0, 0xF0), 0xFE} - {0xE0, 0xEE}


def _pare_jpeg(data: bytes, limits: PictureLimits) -> _Pared:
    """From start to end of the first image, its size from the frame's header. Source: ITU-T T.81, annex B."""
    kept, exif, at = [data[:2]], b"", 2
    width = height = 0
    for _ in range(_MAX_PARTS):
        marker = _JPEG_MARKER.search(data, at)
        if marker is None or marker[1][0] == _JPEG_END:
            raise ValueError("no pixels")
        code, start, at = marker[1][0], marker.start(), marker.end()
        if code in _JPEG_LONE:
            continue
        if code == _JPEG_SCAN:
            # In the data of a scan a 0xFF is followed by zero, so this marker is a marker.
            end = data.index(bytes((0xFF, _JPEG_END)), at) + 2
            if not width or data.count(bytes((0xFF, _JPEG_SCAN)), start, end) > _MAX_SCANS:
                raise ValueError("no size, or too many scans")
            return _Pared(width, height, b"".join([*kept, data[start:end]]), exif)
        (length,) = struct.unpack_from(">H", data, at)
        segment, at = data[start : at + length], at + length
        if code in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", segment, 5)
            _check_size(width, height, limits)
        if code == 0xE1 and segment.startswith(b"Exif\0\0", 4):
            exif = exif or segment[4:]
        if code not in _JPEG_DROPPED:
            kept.append(segment)
    raise ValueError("too many parts")


def _pare_webp(data: bytes, limits: PictureLimits) -> _Pared:
    """The whole file: its decoder parses defensively, but allocates by the header's size on opening. Source: RFC 9649, 2."""
    exif, first, at = b"", data[12:16], 12
    if first == b"VP8X":
        width, height = (1 + int.from_bytes(data[place : place + 3], "little") for place in (24, 27))
    elif first == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    _check_size(width, height, limits)
    for _ in range(_MAX_PARTS):
        if at + 8 > len(data):
            return _Pared(width, height, data, exif)
        name, length = struct.unpack_from("<4sI", data, at)
        if name == b"EXIF":
            exif = data[at + 8 : at + 8 + length]
        at += 8 + length + (length & 1)
    raise ValueError("too many parts")


def _pare_gif(data: bytes, limits: PictureLimits) -> _Pared:
    """The first frame on a screen that holds it: Pillow would enlarge the screen, and warn. Source: GIF89a, 17 to 24."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    start = at = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
    control = b""
    for _ in range(_MAX_PARTS):
        if data[at] == ord(","):
            left, top, frame_width, frame_height = struct.unpack_from("<4H", data, at + 1)
            width, height = max(width, left + frame_width), max(height, top + frame_height)
            _check_size(width, height, limits)
            screen = struct.pack("<HH", min(width, 0xFFFF), min(height, 0xFFFF))
            return _Pared(width, height, data[:6] + screen + data[10:start] + control + data[at:])
        if data[at] != ord("!"):
            raise ValueError("no frame")
        if data[at + 1 : at + 3] == b"\xf9\x04":
            control = data[at : at + 7] + b"\0"
        at = _after_blocks(data, at + 2)
    raise ValueError("too many parts")


def _after_blocks(data: bytes, at: int) -> int:
    for _ in range(_MAX_PARTS):
        length = data[at]
        at += 1 + length
        if not length:
            return at
    raise ValueError("too many parts")


def _pare_bmp(data: bytes, limits: PictureLimits) -> _Pared:
    """The whole file, which has nothing but pixels. Not run-length coded: Pillow decodes that in Python, for seconds."""
    (header_size,) = struct.unpack_from("<I", data, 14)
    if header_size == 12:
        width, height = struct.unpack_from("<HH", data, 18)
        compression = 0
    else:
        width, height, _, compression = struct.unpack_from("<iiII", data, 18)
    height = abs(height)
    _check_size(width, height, limits)
    if compression not in (0, 3):
        raise ValueError("compressed")
    return _Pared(width, height, data)


class _Format(NamedTuple):
    """How a format is told, pared and opened."""

    name: str
    magic: re.Pattern[bytes]
    pare: Callable[[bytes, PictureLimits], _Pared]
    opens: Callable[[io.BytesIO], ImageFile]


_FORMATS = (
    _Format("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), _pare_png, PngImageFile),
    _Format("JPEG", re.compile(rb"\xff\xd8\xff"), _pare_jpeg, JpegImageFile),
    _Format("WEBP", re.compile(rb"RIFF....WEBPVP8[ LX]", re.DOTALL), _pare_webp, WebPImageFile),
    _Format("GIF", re.compile(rb"GIF8[79]a"), _pare_gif, GifImageFile),
    _Format("BMP", re.compile(rb"BM"), _pare_bmp, BmpImageFile),
)
