"""Warnings, and what becomes of them where the server is strict: the one place that decides between the two.

No HTTP, no schema. `body` makes one list for each request; whoever finds out more later adds to it.
"""

from __future__ import annotations

from service.errors import RequestError

MAX_WARNINGS = 16


class Warnings(list[str]):
    """What was ignored, clamped or cut of one request, in order, at most MAX_WARNINGS of it. is_strict: the first one is an error."""

    def __init__(self, is_strict: bool = False) -> None:
        super().__init__()
        self.is_strict = is_strict

    @property
    def is_full(self) -> bool:
        return len(self) >= MAX_WARNINGS

    def note(self, param: str, text: str) -> None:
        """About one field. Mutates: the list, until it is full. Raises: RequestError where strict."""
        if self.is_strict:
            raise RequestError(f"{text}: this server is strict and refuses that", param=param, code="strict_mode")
        if not self.is_full:
            self.append(text)
