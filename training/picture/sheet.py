"""Contact sheets: rows of small pictures, enlarged without smoothing, as one PNG. Called by stages and by evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def write_sheet(path: Path, rows: Sequence[NDArray[np.uint8]], *, columns: int = 12, scale: int = 3, gap: int = 2) -> None:
    """rows: uint8 [N, Y, X, 3] each, all of one shape; picture i of every row stands under the others. Wraps after `columns`."""
    count, height, width = rows[0].shape[:3]
    bands = -(-count // columns)
    step_y, step_x = height + gap, width + gap
    sheet = np.full((bands * (len(rows) * step_y + gap), min(columns, count) * step_x + gap, 3), 255, dtype=np.uint8)
    for index in range(count):
        left = gap + (index % columns) * step_x
        for row, pictures in enumerate(rows):
            top = gap + (index // columns) * (len(rows) * step_y + gap) + row * step_y
            sheet[top : top + height, left : left + width] = pictures[index]
    picture = Image.fromarray(sheet)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)
