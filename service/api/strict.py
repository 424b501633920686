"""Warnings, and what becomes of them where the server is strict: the one place that decides between the two.

No HTTP, no schema. Called by `body` for unknown fields and by `Backend.warn` for all that is found out later.
"""

from __future__ import annotations

from service.errors import RequestError

MAX_WARNINGS = 16


def warn(warnings: list[str], param: str, text: str, *, is_strict: bool) -> None:
    """Notes what is ignored, clamped or cut of a field. Mutates: warnings, up to MAX_WARNINGS. Raises: RequestError where strict."""
    if is_strict:
        raise RequestError(f"{text}: this server is strict and refuses that", param=param, code="strict_mode")
    if len(warnings) < MAX_WARNINGS:
        warnings.append(text)
