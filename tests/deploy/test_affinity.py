"""What a request tells about where it belongs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.deploy.affinity import Affinity, kept_name, made_names, read_affinity

LONG = "You are a careful assistant. " * 40


def chat(*texts: str, **more: Any) -> bytes:
    roles = ("system", "user", "assistant")
    return json.dumps({"messages": [{"role": roles[i % 3], "content": text} for i, text in enumerate(texts)], **more}).encode()


def read(body: bytes, **headers: str) -> Affinity:
    return read_affinity(headers, body)


def shared(one: bytes, other: bytes) -> int:
    """Keys in common, which must be the first ones."""
    first, second = read(one).keys, read(other).keys
    count = len(set(first) & set(second))
    assert first[:count] == second[:count]
    return count


def test_a_conversation_shares_all_keys_of_its_past() -> None:
    past = chat(LONG, "What is a braid?")
    later = chat(LONG, "What is a braid?", "Three strands.", "And a rope?")
    assert shared(past, later) == len(read(past).keys) > 3
    assert len(read(later).keys) > len(read(past).keys)


def test_two_conversations_share_the_keys_of_their_system_message() -> None:
    one, other = chat(LONG, "What is a braid?"), chat(LONG, "Count to ten.")
    assert 0 < shared(one, other) < len(read(one).keys)


def test_a_long_text_has_keys_inside() -> None:
    one = json.dumps({"prompt": LONG + "A"}).encode()
    other = json.dumps({"prompt": LONG + "B"}).encode()
    assert shared(one, other) == 3  # at 256, 512 and 1,024 bytes


def test_short_prompts_have_none() -> None:
    assert read(chat("Hello")).keys == ()


@pytest.mark.parametrize("more", [{"model": "other"}, {"cache_salt": "x"}, {"tools": [{"type": "function", "function": {"name": "f"}}]}])
def test_what_changes_the_cache_or_the_beginning_changes_every_key(more: dict[str, Any]) -> None:
    assert shared(chat(LONG, "Hi"), chat(LONG, "Hi", **more)) == 0


def test_tenants_share_nothing() -> None:
    body = chat(LONG, "Hi")
    one, other = read(body, authorization="Bearer key-of-one"), read(body, authorization="Bearer key-of-other")
    assert not set(one.keys) & set(other.keys)
    assert one.owner != other.owner != 0
    assert read(body, **{"x-api-key": "key-of-one"}) == one
    assert read(body).owner == 0


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"null", b'{"messages": 5}', b'{"prompt": {"a": 1}}', b"\xff\xfe", b"[" * 100_000, b"{" * 9]
)
def test_what_is_no_request_has_no_keys(body: bytes) -> None:
    assert read(body).keys == ()


def test_keys_are_bounded_and_keep_both_ends() -> None:
    texts = [f"{LONG} {number}" for number in range(60)]
    full, half = read(chat(*texts)).keys, read(chat(*texts[:30])).keys
    assert len(full) == len(half) == 32
    assert full[:8] == half[:8]
    assert full[-1] != half[-1]


def test_stored_things_are_told_by_path_or_body() -> None:
    name = "resp_" + "0a" * 16
    assert kept_name(f"/v1/responses/{name}/cancel", b"") == name
    assert kept_name("/v1/responses", json.dumps({"input": "x", "previous_response_id": name}).encode()) == name
    assert kept_name("/v1/videos/video_0123456789abcdef/content", b"") == "video_0123456789abcdef"
    assert kept_name("/v1/images/kept/abcdefghijkl.png", b"") == "abcdefghijkl.png"
    assert kept_name("/v1/chat/completions", b"{}") == kept_name("/v1/responses", b'{"input": "x"}') == ""


def test_what_an_answer_made_is_found_in_it() -> None:
    name = "resp_" + "0a" * 16
    assert made_names("/v1/responses", f'data: {{"response":{{"id": "{name}"}}}}'.encode()) == [name]
    assert made_names("/v1/images/generations", b'{"data":[{"url":"http://h:8000/v1/images/kept/abcdefghijkl.png"}]}') == [
        "abcdefghijkl.png"
    ]
    assert made_names("/v1/chat/completions", f'"id":"{name}"'.encode()) == []
