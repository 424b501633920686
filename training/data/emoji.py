"""Emoji as packed pictures with names and tags in two languages: one uint8 array a style, built once from registry packages.

Chooses nothing to train on (memory does) and fetches nothing itself. Called by training's stages and by the world's stamps.
Shape suffixes: N emoji, S pixels of a side.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from service.errors import StartupError
from training.data.fetch import Package, fetch
from training.data.store import built

Pixels = NDArray[np.uint8]

NOTO = Package("npm", "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", "Apache-2.0")
TWEMOJI = Package(
    "npm", "emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877", "CC-BY-4.0"
)
FLUENT_3D = Package("npm", "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "MIT")
FLUENT_FLAT = Package(
    "npm", "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", "MIT"
)
NAMES = Package("npm", "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "MIT")

_LAYOUT = "2"  # raised when what is built below changes
_SVG_PIXELS = 256  # drawn so large before it is scaled down


@dataclass(frozen=True, slots=True)
class Emoji:
    """One emoji without skin tone. key: its code points in lower-case hexadecimal, joined by "-", without fe0f. category as in Unicode's
    list ("Food & Drink"), subcategory as there ("food-fruit"). version: of the emoji standard that brought it."""

    key: str
    label: str
    tags: tuple[str, ...]
    label_zh: str
    tags_zh: tuple[str, ...]
    category: str
    subcategory: str
    version: float


@dataclass(frozen=True, slots=True)
class EmojiSet:
    """pictures: by style, uint8 [N, S, S, 3] on white; present: by style, bool [N], False where the style lacks the emoji (zeros)."""

    entries: tuple[Emoji, ...]
    pictures: dict[str, Pixels]
    present: dict[str, NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Style:
    """A way emoji are drawn. is_unseen: never shown to the image tokenizer in training. read: every picture of the package, RGBA, by
    key; only_keys spares the work on others."""

    package: Package
    is_unseen: bool
    read: Callable[[Path, frozenset[str]], Iterator[tuple[str, Image.Image]]]


def emoji_key(code_points: str) -> str:
    """The key of code points as data sets spell them. fe0f only asks for colour, and sets disagree on where it stands."""
    return "-".join(part for part in code_points.lower().split("-") if part != "fe0f")


def load_emoji(size: int = 32, styles: Sequence[str] = ("noto", "twemoji")) -> EmojiSet:
    """All base emoji in the styles asked for, at size x size pixels; builds on first use.

    Raises: KeyError for an unknown style; StartupError when a package can't be had.
    """
    entries = load_entries()
    pictures, present = {}, {}
    for name in styles:
        folder = built(f"emoji-{_LAYOUT}-{name}-{size}", _builder(STYLES[name], entries, size))
        arrays = load_file(folder / "pictures.safetensors")
        pictures[name], present[name] = arrays["pictures"], arrays["present"]
    return EmojiSet(entries, pictures, present)


def load_entries() -> tuple[Emoji, ...]:
    """Every base emoji of Unicode's list in its order, with names. Raises: StartupError when a package can't be had."""
    path = built(f"emoji-{_LAYOUT}-entries", _build_entries) / "entries.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    return tuple(Emoji(**{**entry, "tags": tuple(entry["tags"]), "tags_zh": tuple(entry["tags_zh"])}) for entry in entries)


def read_pictures(style: str, keys: frozenset[str]) -> dict[str, Image.Image]:
    """The pictures of some emoji as the package holds them, RGBA. Raises: KeyError for an unknown style or an emoji that it lacks."""
    found = dict(STYLES[style].read(fetch(STYLES[style].package), keys))
    if missing := keys - found.keys():
        raise KeyError(f"{style} has no {', '.join(sorted(missing))}")
    return found


def on_white(picture: Image.Image, size: int) -> Pixels:
    """uint8 [S, S, 3] of an RGBA picture, Lanczos."""
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return np.asarray(white.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def _builder(style: Style, entries: Sequence[Emoji], size: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        index = {entry.key: place for place, entry in enumerate(entries)}
        pictures = np.zeros((len(entries), size, size, 3), np.uint8)
        present = np.zeros(len(entries), np.bool_)
        for key, picture in style.read(fetch(style.package), frozenset(index)):
            pictures[index[key]] = on_white(picture, size)
            present[index[key]] = True
        save_file({"pictures": pictures, "present": present}, folder / "pictures.safetensors")

    return build


def _build_entries(folder: Path) -> None:
    with _opened(fetch(NOTO)) as archive:
        listed = _json_of(archive, "package/emoji.json")
    with _opened(fetch(NAMES)) as archive:
        named = {lang: _names(_json_of(archive, f"package/{lang}/data.json")) for lang in ("en", "zh")}
    entries = [
        _entry(emoji, named["en"][key], named["zh"][key])
        for emoji in sorted(listed, key=lambda emoji: int(emoji["sort_order"]))
        if (key := emoji_key(emoji["unified"])) in named["en"] and key in named["zh"]
    ]
    text = json.dumps([asdict(entry) for entry in entries], ensure_ascii=False)
    (folder / "entries.json").write_text(text, encoding="utf-8")


def _names(listed: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {emoji_key(entry["hexcode"]): entry for entry in listed}


def _entry(emoji: Mapping[str, Any], en: Mapping[str, Any], zh: Mapping[str, Any]) -> Emoji:
    return Emoji(
        key=emoji_key(emoji["unified"]),
        label=en["label"],
        tags=tuple(en.get("tags", ())),
        label_zh=zh["label"],
        tags_zh=tuple(zh.get("tags", ())),
        category=emoji["category"],
        subcategory=emoji["subcategory"],
        version=float(en["version"]),
    )


def _read_files(folder: str, suffix: str) -> Callable[[Path, frozenset[str]], Iterator[tuple[str, Image.Image]]]:
    """Reader of a package that has one file an emoji, named by its code points."""

    def read(path: Path, only_keys: frozenset[str]) -> Iterator[tuple[str, Image.Image]]:
        with _opened(path) as archive:
            for member in archive:
                name = member.name.removeprefix(folder)
                key = emoji_key(name.removesuffix(suffix))
                if name != member.name and name.endswith(suffix) and key in only_keys:
                    yield key, _decoded(_member(archive, member))

    return read


def _read_icons(path: Path, only_keys: frozenset[str]) -> Iterator[tuple[str, Image.Image]]:
    """Reader of a package that has all emoji as SVG bodies in one JSON."""
    import resvg_py  # only this style needs it

    with _opened(path) as archive:
        icons = _json_of(archive, "package/icons.json")
        names = _json_of(archive, "package/chars.json")
    for code_points, name in names.items():
        key = emoji_key(code_points)
        icon = icons["icons"].get(name)
        if icon and key in only_keys:
            width, height = icon.get("width", icons.get("width", 32)), icon.get("height", icons.get("height", 32))
            body = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            yield key, _decoded(bytes(resvg_py.svg_to_bytes(svg_string=body, width=_SVG_PIXELS, height=_SVG_PIXELS)))


def _decoded(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.convert("RGBA")


def _opened(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except tarfile.TarError as error:
        raise StartupError(f"{path.name} is no archive: {error}") from error


def _json_of(archive: tarfile.TarFile, name: str) -> Any:
    try:
        return json.loads(_member(archive, archive.getmember(name)))
    except (KeyError, ValueError) as error:
        raise StartupError(f"the package does not hold {name} as it should: {error}") from error


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise StartupError(f"{member.name} of the package is no file")
    return file.read()


STYLES = {
    "noto": Style(NOTO, False, _read_files("package/img/google/64/", ".png")),
    "twemoji": Style(TWEMOJI, False, _read_files("package/img/twitter/64/", ".png")),
    "fluentflat": Style(FLUENT_FLAT, False, _read_icons),
    "fluent3d": Style(FLUENT_3D, True, _read_files("package/assets/", ".webp")),
}
