"""Which K/V blocks are free, cached or used, and under which key a full block can be found again. Ids only: no tensor, no sequence.

Every block is in exactly one place: free (holds nothing), cached (held by nobody, still findable, oldest first) or used (held by
`refs` tables). Used by `tables` alone.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockKey:
    """Names what a block holds: its tokens, and all that came before (`parent`, or the tenant's root).

    The digest finds, the other fields are compared before a hit is believed.
    """

    digest: bytes
    parent: bytes
    tokens: tuple[int, ...]

    @staticmethod
    def root(tenant: str) -> bytes:
        """The parent of a tenant's first blocks: two tenants never share a key."""
        return hashlib.sha256(b"tenant:" + tenant.encode(errors="surrogatepass")).digest()

    @staticmethod
    def make(parent: bytes, tokens: Iterable[int]) -> BlockKey:
        """Every part has a fixed width or its length in front, so no two contents spell the same bytes."""
        ids = tuple(tokens)
        sha = hashlib.sha256(parent)
        sha.update(array("q", (len(ids), *ids)))
        return BlockKey(sha.digest(), parent, ids)


class BlockPool:
    """num_blocks ids, shared by all K/V groups; a key is found only in the group that sealed it."""

    def __init__(self, num_blocks: int, num_groups: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._sealed: list[tuple[int, BlockKey] | None] = [None] * num_blocks  # (group, key)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._found: list[dict[bytes, int]] = [{} for _ in range(num_groups)]

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free, or cached and evictable."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def is_used(self, block: int) -> bool:
        return self._refs[block] > 0

    def allocate(self) -> int:
        """A block with unknown contents, held once; evicts the longest unused cached one when none is free.

        Raises: IndexError when every block is used; ask `num_available` first.
        """
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._evict(block)
        else:
            raise IndexError("every K/V block is in use")
        self._refs[block] = 1
        return block

    def find(self, group: int, key: BlockKey) -> int | None:
        """The block that holds exactly this content, or None."""
        block = self._found[group].get(key.digest)
        if block is None:
            return None
        sealed = self._sealed[block]
        return block if sealed is not None and sealed[1] == key else None

    def share(self, block: int) -> None:
        """One more table holds this block. Only sealed blocks are shared: nobody writes them again."""
        if self._refs[block] == 0:
            del self._cached[block]
        self._refs[block] += 1

    def seal(self, block: int, group: int, key: BlockKey) -> None:
        """Makes a full, computed block findable. When an equal one is already, that one stays the findable one."""
        if self._sealed[block] is None and self._found[group].setdefault(key.digest, block) == block:
            self._sealed[block] = (group, key)

    def release(self, block: int) -> None:
        """One table fewer holds it; the last one leaves it cached if it can be found, else free."""
        self._refs[block] -= 1
        if self._refs[block]:
            return
        if self._sealed[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None

    def check(self, holders: Mapping[int, int]) -> None:
        """holders: how many table entries name each block. Raises: AssertionError naming the first broken promise."""
        for block, refs in enumerate(self._refs):
            if refs != holders.get(block, 0):
                raise AssertionError(f"block {block} has {refs} references and stands in {holders.get(block, 0)} tables")
        used = {block for block, refs in enumerate(self._refs) if refs}
        places = [*self._free, *self._cached, *used]
        if sorted(places) != list(range(self.num_blocks)):
            raise AssertionError(f"{len(self._free)} free, {len(self._cached)} cached and {len(used)} used blocks are not the whole pool")
        found = {block: (group, digest) for group, blocks in enumerate(self._found) for digest, block in blocks.items()}
        sealed = {block: (entry[0], entry[1].digest) for block, entry in enumerate(self._sealed) if entry is not None}
        if found != sealed or sum(map(len, self._found)) != len(found):
            raise AssertionError("the blocks that can be found are not those that were sealed")
        if any(block in sealed for block in self._free) or any(block not in sealed for block in self._cached):
            raise AssertionError("a free block can be found, or a cached one can't")

    def _evict(self, block: int) -> None:
        sealed = self._sealed[block]
        if sealed is not None:
            del self._found[sealed[0]][sealed[1].digest]
            self._sealed[block] = None
