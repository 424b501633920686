"""What a request says about where it belongs: whose it is, digests of its prompt's beginnings, and a stored thing that it names.

Pure: reads bytes and answers with plain values; no tokenizer, no network, no ray. Called by the gate once a request; `routing` reads it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

FIRST_BYTES = 256
"""Shorter beginnings are no reason to prefer a replica: some sixty tokens, which any of them computes in a step."""
_MAX_KEYS = 32  # the first quarter and the last three are kept: what many share, and what one conversation is known by
# The parts of a prompt in the order in which templates write them.
_PARTS = ("tools", "instructions", "system", "messages", "prompt", "query", "input")
# Things that live in the memory of the one replica that made them.
_KEPT_PATH = re.compile(r"/v1/(?:responses|videos|images/kept)/([A-Za-z0-9_.\-]{8,128})")
_MADE = re.compile(rb'"(?:id|response_id)"\s*:\s*"((?:resp|video)_[0-9a-f]{16,64})"|/v1/images/kept/([A-Za-z0-9_.\-]{8,128})')
_MAKING_PATHS = ("/v1/responses", "/v1/videos", "/v1/images")


@dataclass(frozen=True, slots=True)
class Affinity:
    """keys: digests of longer and longer beginnings of the prompt, the shortest first. owner: digest of the tenant, 0 for none.
    replica: the name of the one that has to answer, "" for any."""

    keys: tuple[int, ...] = ()
    owner: int = 0
    replica: str = ""


def read_affinity(headers: Mapping[str, str], body: bytes, replica: str = "") -> Affinity:
    """headers: by lower-case name. body: of any kind; what is no JSON object has no keys."""
    tenant = _tenant(headers)
    asked = _json_object(body)
    seed = _digest(repr((tenant, asked.get("model"), asked.get("cache_salt"))).encode())
    return Affinity(tuple(_chain(seed, _pieces(asked))), _number(tenant) if tenant else 0, replica)


def kept_name(path: str, body: bytes) -> str:
    """The stored thing that a request is about, "" for none: a response, a video or a picture behind a URL."""
    if found := _KEPT_PATH.match(path):
        return found[1]
    if path == "/v1/responses" and b"previous_response_id" in body:
        named = _json_object(body).get("previous_response_id")
        return named if isinstance(named, str) else ""
    return ""


def made_names(path: str, data: bytes) -> list[str]:
    """The stored things that part of an answer tells of. A name that is cut in two by the transport is missed."""
    if not path.startswith(_MAKING_PATHS):
        return []
    return [(named or picture).decode() for named, picture in _MADE.findall(data)]


def _tenant(headers: Mapping[str, str]) -> bytes:
    """A digest of the key, so that no key is kept. The key is not checked here: a wrong one is refused wherever it arrives."""
    key = headers.get("x-api-key") or headers.get("authorization", "").partition(" ")[2]
    return _digest(key.strip().encode()) if key else b""


def _json_object(body: bytes) -> dict[str, Any]:
    if body.lstrip()[:1] != b"{":
        return {}
    try:
        asked = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return {}
    return asked if isinstance(asked, dict) else {}


def _pieces(asked: Mapping[str, Any]) -> Iterator[bytes]:
    """The prompt, cut where a longer one may go on: after each message, tool or text."""
    for part in _PARTS:
        value = asked.get(part)
        if isinstance(value, str):
            yield value.encode(errors="replace")
        elif isinstance(value, list):
            yield from map(msgspec.json.encode, value)


def _chain(seed: bytes, pieces: Iterable[bytes]) -> list[int]:
    """A key at 256, 512, 1,024 ... bytes and at every end of a piece."""
    digest = hashlib.blake2b(seed, digest_size=8)
    keys = list[int]()
    done, mark = 0, FIRST_BYTES
    for piece in pieces:
        start = 0
        while done + len(piece) - start >= mark:
            digest.update(piece[start : start + mark - done])
            start += mark - done
            done, mark = mark, 2 * mark
            keys.append(int.from_bytes(digest.digest(), "big"))
        digest.update(piece[start:])
        digest.update(b"\0")
        done += len(piece) - start
        if done >= FIRST_BYTES:
            keys.append(int.from_bytes(digest.digest(), "big"))
    if len(keys) > _MAX_KEYS:
        keys = keys[: _MAX_KEYS // 4] + keys[-_MAX_KEYS * 3 // 4 :]
    return keys


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")
