"""How much structure a JSON text may have: counted before it is decoded, because a value costs far more memory and time than its text.

Bytes and decoded values only: no schema, no HTTP. Called by `body`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from service.errors import RequestError

MAX_VALUES = 2**20
MAX_CONTAINERS = 2**18
MAX_KEYS = 2**19
MAX_DEPTH = 256


def check_size(text: bytes) -> None:
    """Raises: RequestError when there are too many separators: of elements, of keys and values, or of lists and objects.

    Those inside of strings count too, which keeps this at the speed of memchr; a text that has so many is beyond every model's context.
    """
    num_containers = text.count(b"[") + text.count(b"{")
    if num_containers > MAX_CONTAINERS:
        raise _too_many(f"brackets that open a list or an object, {num_containers}", MAX_CONTAINERS)
    if (num_commas := text.count(b",")) > MAX_VALUES:
        raise _too_many(f"commas, {num_commas}", MAX_VALUES)
    if (num_colons := text.count(b":")) > MAX_KEYS:
        raise _too_many(f"colons, {num_colons}", MAX_KEYS)


def _too_many(what: str, limit: int) -> RequestError:
    return RequestError(f"the body has too many {what}; at most {limit} are allowed", code="too_many_values")


def check_depth(data: Any, text: bytes) -> None:
    """data: what the text decodes to. Raises: RequestError when containers stand in one another more than MAX_DEPTH deep."""
    if text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        level = [child for each in level for child in _children(each) if isinstance(child, dict | list)]
        if not level:
            return
    raise RequestError(f"the body is nested too deeply: more than {MAX_DEPTH} levels", code="invalid_json")


def _children(container: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container
