"""What is held out of training, decided by a hash of its name: the same on every machine, whatever the order and the seed.

No data here. Called by the data builders and by the world.
"""

from __future__ import annotations

import hashlib


def is_held_out(key: str, share: float, salt: str) -> bool:
    """Whether this name falls into the held-out share (0 ... 1). salt: keeps splits of different kinds apart."""
    digest = hashlib.sha256(f"{salt}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
