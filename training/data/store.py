"""Folders of prepared data in the user's cache: each is built once, whole or not at all, whoever asks first.

Knows nothing of what is inside. Called by emoji and text.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from training.data.fetch import data_folder


def built(name: str, build: Callable[[Path], None]) -> Path:
    """The folder of that name, filled by build(folder) when it is not there. An interrupted build leaves nothing under the name.

    name: changes with everything that changes the contents. Mutates: the cache. Raises: whatever build raises.
    """
    place = data_folder() / name
    if place.is_dir():
        return place
    with FileLock(place.with_name(f"{name}.lock")):
        if not place.is_dir():
            scratch = Path(tempfile.mkdtemp(prefix=".build-", dir=place.parent))
            try:
                build(scratch)
                scratch.chmod(0o755)
                scratch.replace(place)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return place
