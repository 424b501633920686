"""The small emoji of the world of scenes: sixteen that can be told apart at 16 x 16 pixels, with names short enough for a sentence.

Knows no scene. Called by whoever opens the world with stamps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from training.data.emoji import Pixels, read_pictures
from training.data.store import built

STAMP_PIXELS = 16
_STYLE = "noto"
# Name: Chinese name, key. No name begins with a vowel ("a" is always its article), holds a colour, or ends in another one's name.
_STAMPS = {
    "cat": ("猫", "1f431"),
    "dog": ("狗", "1f436"),
    "bear": ("熊", "1f43b"),
    "frog": ("青蛙", "1f438"),
    "pig": ("猪", "1f437"),
    "fish": ("鱼", "1f41f"),
    "turtle": ("乌龟", "1f422"),
    "strawberry": ("草莓", "1f353"),
    "banana": ("香蕉", "1f34c"),
    "pizza": ("披萨", "1f355"),
    "sun": ("太阳", "2600"),
    "house": ("房子", "1f3e0"),
    "tree": ("树", "1f332"),
    "car": ("汽车", "1f697"),
    "rocket": ("火箭", "1f680"),
    "ball": ("球", "26bd"),
}
STAMP_NAMES_ZH = {name: name_zh for name, (name_zh, _) in _STAMPS.items()}


def load_stamps() -> dict[str, Pixels]:
    """uint8 RGBA [16, 16, 4] by English name; STAMP_NAMES_ZH has the Chinese ones. Builds on first use.

    Raises: StartupError when the package can't be had.
    """
    pictures = load_file(built("stamps-2", _build) / "stamps.safetensors")["stamps"]
    return dict(zip(_STAMPS, pictures, strict=True))


def _build(folder: Path) -> None:
    keys = [key for _, key in _STAMPS.values()]
    found = read_pictures(_STYLE, frozenset(keys))
    side = (STAMP_PIXELS, STAMP_PIXELS)
    stamps = np.stack([np.asarray(found[key].resize(side, Image.Resampling.LANCZOS)) for key in keys])
    save_file({"stamps": stamps}, folder / "stamps.safetensors")
