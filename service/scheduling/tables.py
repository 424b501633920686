"""Block arithmetic: what a sequence must hold to go on, in every K/V group at once. Moves blocks between the pool and the tables.

A row is one block per group for the same block_size positions; all tables of a sequence have equally many rows. What must not live
here: who runs, who waits, who loses. Used by `roster`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from service.scheduling.block_pool import BlockKey, BlockPool
from service.scheduling.plan import KVGroup
from service.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Prefix:
    """The longest cached beginning of a sequence: num_rows, and a table per group; -1 where the group does not look back so far."""

    num_rows: int
    tables: tuple[tuple[int, ...], ...]

    def num_blocks(self, group: int) -> int:
        return sum(1 for block in self.tables[group] if block >= 0)


class BlockTables:
    """whole_prompts: a sequence's tokens are computed at once, so that windows give nothing back meanwhile."""

    def __init__(
        self, pool: BlockPool, groups: tuple[KVGroup, ...], block_size: int, *, has_prefix_cache: bool, whole_prompts: bool = False
    ) -> None:
        self.pool = pool
        self.groups = groups
        self.block_size = block_size
        self.has_prefix_cache = has_prefix_cache
        self.whole_prompts = whole_prompts
        self._sink_rows = [-(-group.sink // block_size) if group.window is not None else 0 for group in groups]
        self._windowed = [index for index, group in enumerate(groups) if group.window is not None]

    @property
    def num_free_rows(self) -> int:
        return self.pool.num_available // len(self.groups)

    # -- how much --

    def num_rows(self, length: int) -> int:
        return -(-length // self.block_size)

    def peak_blocks(self, length: int) -> list[int]:
        """Per group, the most blocks that one sequence must hold at once to compute `length` tokens, row by row.

        A window of w tokens touches at most ceil((w - 1) / block_size) + 1 blocks.
        """
        rows, size = self.num_rows(length), self.block_size
        return [
            rows if group.window is None or self.whole_prompts else min(rows, sink_rows + (group.window + size - 2) // size + 1)
            for group, sink_rows in zip(self.groups, self._sink_rows, strict=True)
        ]

    def num_held(self, sequence: Sequence, group: int) -> int:
        table = sequence.tables[group]
        return len(table) - table.count(-1) if group in self._windowed else len(table)

    def missing_blocks(self, sequence: Sequence) -> int:
        """Blocks still needed until all of the sequence's known tokens are computed."""
        return sum(max(0, peak - self.num_held(sequence, group)) for group, peak in enumerate(self.peak_blocks(len(sequence.tokens))))

    def cost(self, sequence: Sequence, prefix: Prefix) -> int:
        """Blocks that become unavailable when the sequence comes in with this prefix and computes all of its known tokens."""
        missing = sum(max(0, peak - prefix.num_blocks(group)) for group, peak in enumerate(self.peak_blocks(len(sequence.tokens))))
        return missing + sum(1 for table in prefix.tables for block in table if block >= 0 and not self.pool.is_used(block))

    def room(self, sequence: Sequence, rows: int) -> int:
        """How many more tokens fit into what it holds and `rows` new rows."""
        return (len(sequence.tables[0]) + rows) * self.block_size - sequence.num_computed

    def missing_rows(self, sequence: Sequence, count: int) -> int:
        """New rows for its next `count` tokens."""
        return max(0, self.num_rows(sequence.num_computed + count) - len(sequence.tables[0]))

    # -- from the pool and back --

    def extend(self, sequence: Sequence, count: int) -> None:
        """Allocates rows for its next `count` tokens."""
        for _ in range(self.missing_rows(sequence, count)):
            for table in sequence.tables:
                table.append(self.pool.allocate())
            sequence.frozen_tables = None

    def find_prefix(self, sequence: Sequence, limit: int) -> Prefix:
        """The longest hit of at most `limit` tokens, which leaves at least the last token to be computed (see `Gang.hit_limit`). Where that
        one alone is beyond the limit and ends a block, the block may be found as well: then it is computed and not written."""
        is_whole = limit == len(sequence.tokens) - 1 and not self._windowed  # a window would have to begin a token earlier
        keys = self.keys(sequence, (limit + is_whole) // self.block_size if self.has_prefix_cache else 0)
        rows = self._hit_rows(keys)
        tables = []
        for group in range(len(self.groups)):
            table = [-1] * rows
            for row in self._visible_rows(group, rows):
                block = self.pool.find(group, keys[row])
                table[row] = -1 if block is None else block
            tables.append(tuple(table))
        return Prefix(rows, tuple(tables))

    def adopt(self, sequence: Sequence, prefix: Prefix) -> None:
        """The sequence, which holds nothing, starts behind the prefix and shares its blocks."""
        for group, table in enumerate(prefix.tables):
            for block in table:
                if block >= 0:
                    self.pool.share(block)
            sequence.tables[group] = list(table)
        sequence.num_known = prefix.num_rows * self.block_size
        sequence.num_computed = min(sequence.num_known, len(sequence.tokens) - 1)
        sequence.num_sealed = prefix.num_rows
        sequence.frozen_tables = None

    def advance(self, sequence: Sequence, count: int) -> None:
        """`count` more tokens are computed."""
        sequence.num_computed += count
        self.settle(sequence)

    def settle(self, sequence: Sequence) -> None:
        """What counts as computed is: seals what became full, then gives back what no later token sees."""
        full = sequence.num_computed // self.block_size
        if full > sequence.num_sealed:
            if self.has_prefix_cache:
                keys = self.keys(sequence, full)
                for group, table in enumerate(sequence.tables):
                    for row in range(sequence.num_sealed, full):
                        self.pool.seal(table[row], group, keys[row])
            sequence.num_sealed = full
        for group in self._windowed:
            self._trim(sequence, group)

    def release(self, sequence: Sequence) -> None:
        """Gives everything back, the end first, so that of a cached prefix the beginning is evicted last."""
        for row in range(len(sequence.tables[0]) - 1, -1, -1):
            for table in sequence.tables:
                if table[row] >= 0:
                    self.pool.release(table[row])
        sequence.tables = [[] for _ in self.groups]
        sequence.num_trimmed = [0] * len(self.groups)
        sequence.num_computed = sequence.num_sealed = sequence.num_known = 0
        sequence.frozen_tables = None

    def keys(self, sequence: Sequence, rows: int) -> list[BlockKey]:
        """The keys of its first `rows` blocks, all full of known tokens. Mutates: sequence.keys, when asked for more than ever."""
        keys, size = sequence.keys, self.block_size
        for row in range(len(keys), rows):
            parent = keys[-1].digest if keys else sequence.root
            keys.append(BlockKey.make(parent, sequence.tokens[row * size : (row + 1) * size]))
        return keys[:rows]

    # -- integrity --

    def check(self, running: Iterable[Sequence]) -> None:
        """running: every sequence that may hold blocks. Raises: AssertionError."""
        holders: dict[int, int] = {}
        for sequence in running:
            rows = len(sequence.tables[0])
            if any(len(table) != rows for table in sequence.tables):
                raise AssertionError(f"sequence {sequence.sequence_id} has tables of different lengths")
            if not sequence.num_computed < len(sequence.tokens) or rows < self.num_rows(sequence.num_computed):
                raise AssertionError(f"sequence {sequence.sequence_id} has computed {sequence.num_computed} tokens in {rows} rows")
            for group, table in enumerate(sequence.tables):
                seen = [
                    row
                    for row in (*range(self._sink_rows[group]), *range(self._first_row(group, sequence.num_computed), rows))
                    if row < rows
                ]
                if any(table[row] < 0 for row in seen):
                    raise AssertionError(f"sequence {sequence.sequence_id} has given back a block that it still sees")
                for block in table:
                    if block >= 0:
                        holders[block] = holders.get(block, 0) + 1
        self.pool.check(holders)

    # -- windows --

    def _first_row(self, group: int, position: int) -> int:
        """The first row, sinks aside, that a token at this position or later sees."""
        window = self.groups[group].window
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def _visible_rows(self, group: int, rows: int) -> list[int]:
        """Of the first `rows` rows, those that a token right behind them sees, the last first."""
        first = self._first_row(group, rows * self.block_size)
        sinks = min(self._sink_rows[group], first)
        return [*range(rows - 1, first - 1, -1), *range(sinks - 1, -1, -1)]

    def _trim(self, sequence: Sequence, group: int) -> None:
        first = self._first_row(group, sequence.num_computed)
        table = sequence.tables[group]
        for row in range(max(sequence.num_trimmed[group], self._sink_rows[group]), first):
            if table[row] >= 0:
                self.pool.release(table[row])
                table[row] = -1
                sequence.frozen_tables = None
        sequence.num_trimmed[group] = max(first, sequence.num_trimmed[group])

    def _hit_rows(self, keys: list[BlockKey]) -> int:
        """A group that sees everything needs all rows, a windowed one only those that the next token sees.

        A row missing from a window is missing from every shorter hit that reaches beyond it, so the search jumps down to it.
        """
        rows = len(keys)
        for group in range(len(self.groups)):
            if group not in self._windowed:
                rows = next((row for row in range(rows) if self.pool.find(group, keys[row]) is None), rows)
        while rows:
            missing = [
                row
                for group in self._windowed
                if (row := next((r for r in self._visible_rows(group, rows) if self.pool.find(group, keys[r]) is None), -1)) >= 0
            ]
            if not missing:
                break
            rows = min(missing)
        return rows
