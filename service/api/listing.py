"""Lists that come in pages: what the query may ask for, and OpenAI's form of an answer.

No HTTP beyond the query. Shared by the routes that list what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from service.errors import RequestError

T = TypeVar("T")


def page_limit(query: Mapping[str, str], usual: int, most: int) -> int:
    """Raises: RequestError."""
    given = query.get("limit", str(usual))
    if not given.isascii() or not given.isdecimal() or len(given) > 9 or not 1 <= int(given) <= most:
        raise RequestError(f"limit must be a whole number from 1 to {most}", param="limit", code="invalid_value")
    return int(given)


def is_descending(query: Mapping[str, str]) -> bool:
    """The newest first is the usual order. Raises: RequestError."""
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError("order must be asc or desc", param="order", code="invalid_value")
    return order == "desc"


def page(entries: Sequence[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """The entries behind the one with the id `after`. Raises: RequestError when it is not there."""
    start = 0
    if after is not None:
        ids = [entry["id"] for entry in entries]
        if after not in ids:
            raise RequestError("after must be the id of an entry of this list", param="after", code="invalid_value")
        start = ids.index(after) + 1
    shown = list(entries[start : start + limit])
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return {"object": "list", "data": shown, **ends, "has_more": start + limit < len(entries)}
