"""Which pictures of live requests are encoded, which are being, and how far a sequence may go before it meets one that is not.

Digests only: embeddings and codes lie in the runner. Used by `roster` (how far) and `scheduler` (what to encode next).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from service.scheduling.plan import Span
from service.scheduling.sequence import Gang, Sequence


class SpanEncodings:
    """A digest is kept as long as a live gang has a span with it; after that it has to be encoded anew."""

    def __init__(self) -> None:
        self._holders: Counter[bytes] = Counter()
        self._ready: set[bytes] = set()

    def hold(self, gang: Gang) -> None:
        self._holders.update(_digests(gang))

    def drop(self, gang: Gang) -> None:
        for digest in _digests(gang):
            self._holders[digest] -= 1
            if not self._holders[digest]:
                del self._holders[digest]
                self._ready.discard(digest)

    def mark_ready(self, spans: Iterable[Span]) -> None:
        """They were encoded; those whose last gang has ended meanwhile are forgotten."""
        self._ready.update(span.digest for span in spans if span.digest in self._holders)

    def missing(self, sequence: Sequence) -> list[Span]:
        """The spans that its uncomputed tokens need and that are not ready, in order of start."""
        if not sequence.spans:
            return []
        return [span for span in sequence.spans if span.start + span.length > sequence.num_computed and span.digest not in self._ready]

    def limit(self, sequence: Sequence) -> int:
        """How many of its pending tokens come before the first span that is not ready."""
        missing = self.missing(sequence)
        if not missing:
            return sequence.num_pending
        return max(0, missing[0].start - sequence.num_computed)

    def check(self, gangs: Iterable[Gang]) -> None:
        """gangs: all that live. Raises: AssertionError."""
        holders: Counter[bytes] = Counter()
        for gang in gangs:
            holders.update(_digests(gang))
        if holders != self._holders or not self._ready <= holders.keys():
            raise AssertionError("the held pictures are not those of the live gangs")


def _digests(gang: Gang) -> set[bytes]:
    return {span.digest for sequence in gang.sequences for span in sequence.spans}
