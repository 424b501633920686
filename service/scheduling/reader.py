"""How far one gang's reading of its prompt has come: what the next slice must tell, and what the earlier ones have told.

Stdlib only. It outlives a preemption: what was told is kept, what was not is computed again. Carried by `Gang`, asked by `roster` (how
much of the prompt may come from the cache) and `scheduler` (which reads a plan holds, what came of them).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from service.scheduling.plan import PromptRead, PromptReading, TokenReading
from service.scheduling.reading import Read

_ANYTHING = 2**31


@dataclass(eq=False, slots=True)
class PromptReader:
    """logprobs: of the positions read.first ... as far as they are known. vector: None until the prompt's last slice has given it."""

    read: Read
    prompt: tuple[int, ...]
    logprobs: list[TokenReading] = field(default_factory=list)
    vector: bytes | None = None

    @property
    def is_done(self) -> bool:
        return not self._has_targets and not self._needs_vector

    @property
    def hit_limit(self) -> int:
        """So many leading tokens may be found in the prefix cache: all before the first row that is still to be read.

        A mean, or the first row of a vector, begins anew with position 0: what the runner had summed up went with the blocks.
        """
        if self._needs_vector and self.read.pool != "last":
            return 0
        return self._next_target - 1 if self._has_targets else _ANYTHING

    def reading(self) -> PromptReading:
        return PromptReading(tuple(self.logprobs), self.vector)

    def next_read(self, sequence_id: int, slice_index: int, start: int, count: int) -> PromptRead | None:
        """What to read of a slice of `count` prompt tokens from position `start`; None when nothing is."""
        if self.is_done:
            return None
        first = self._next_target
        targets = self.prompt[first : start + count + 1] if self._has_targets else ()
        is_last = start + count == len(self.prompt)
        pool = self.read.pool if self._needs_vector and (is_last or self.read.pool != "last") else ""
        if not targets and not pool:
            return None
        return PromptRead(slice_index, sequence_id, first - 1 - start if targets else 0, targets, self.read.num_top, pool, is_last)

    def take(self, reading: PromptReading) -> None:
        """What came of the last `next_read`. Mutates: logprobs, vector."""
        self.logprobs.extend(reading.logprobs)
        if reading.vector is not None:
            self.vector = reading.vector

    @property
    def _next_target(self) -> int:
        return self.read.first + len(self.logprobs)

    @property
    def _has_targets(self) -> bool:
        return self.read.first > 0 and self._next_target < len(self.prompt)

    @property
    def _needs_vector(self) -> bool:
        return self.read.pool != "" and self.vector is None
