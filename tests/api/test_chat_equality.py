"""Streamed answers against whole ones, case by case: all fields, bytes of characters, stop strings, calls cut at every place."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.api.fakes import Running, Script
from tests.api.test_chat import HI, events
from tests.api.test_chat_tools import CALL, CLOCK, SHELL, TICK, WEATHER, assemble, plain

CHAT = "/v1/chat/completions"
USAGE = {"include_usage": True}


def both(server: Running, **body: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole answer, and the chunks of the same request streamed; their choices and usage must be the same."""
    body = {"messages": HI, **body}
    whole = server.post(CHAT, **body).json()
    chunks = events(server.post(CHAT, **body, stream=True, stream_options=USAGE))
    streamed = [without_ids(assemble(chunks, index)) for index in range(len(whole["choices"]))]
    assert streamed == [without_ids(plain(choice)) for choice in whole["choices"]]
    assert chunks[-1]["usage"] == whole["usage"]
    return whole, chunks


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    """Ids of calls are made up anew each time; within one answer they must differ."""
    calls = choice["tool_calls"]
    assert len({call["id"] for call in calls}) == len(calls)
    return {**choice, "tool_calls": [{**call, "id": place} for place, call in enumerate(calls)]}


def test_case_23_fifty_prompts_with_all_fields(server: Running) -> None:
    """One role chunk and one end a choice (`assemble` insists), [DONE] last (`events` insists), the same logprobs, ids and reasons."""
    dice = random.Random(23)
    words = ["Grüße", " 👋🏽", "\n", "stop", " <", "</think>", "<think>", CALL, TICK, "ab" * 9, "€"]
    for number in range(50):
        server.engine.script = Script(text="".join(dice.choices(words, k=dice.randrange(9))), per_event=dice.choice([1, 2, 5, 20]))
        fields: dict[str, Any] = {
            "messages": [{"role": "user", "content": f"prompt {number}"}],
            "temperature": 0,
            "n": dice.choice([1, 1, 2]),
        }
        optional: list[dict[str, Any]] = [
            {"tools": [WEATHER, CLOCK], "parallel_tool_calls": dice.random() < 0.5},
            {"stop": dice.sample(["stop", "👋", "ab", "}<", "€\n"], 2)},
            {"max_tokens": dice.randrange(1, 80)},
            {"logprobs": True, "top_logprobs": 2},
            {"return_token_ids": True},
            {"include_stop_str_in_output": True},
            {"stop_token_ids": [257]},
        ]
        for each in optional:
            if dice.random() < 0.5:
                fields |= each
        whole, chunks = both(server, **fields)
        for index, choice in enumerate(whole["choices"]):
            own = [each for chunk in chunks for each in chunk["choices"] if each["index"] == index]
            assert own[-1].get("stop_reason") == choice.get("stop_reason")
            entries = [entry for each in own for entry in (each["logprobs"] or {}).get("content", [])]
            assert entries == (choice["logprobs"] or {}).get("content", [])


@pytest.mark.parametrize("per_event", [1, 2, 3, 5, 7])
def test_case_24_characters_are_never_split(server: Running, per_event: int) -> None:
    """The fake model's tokens are single bytes."""
    for text in ("é" * 20, "👩‍👩‍👧‍👦 and 👋🏽", "a\u0301\u200d漢字", "\U0010ffff\u0000x", "\ufeffx"):
        server.engine.script = Script(text=text, per_event=per_event)
        whole, chunks = both(server)
        assert whole["choices"][0]["message"]["content"] == text
        assert all("�" not in json.dumps(chunk, ensure_ascii=False) for chunk in chunks)


@pytest.mark.parametrize("per_event", [1, 2, 3, 5, 20])
def test_case_25_stop_strings_cut_exactly(server: Running, per_event: int) -> None:
    cases = [
        ("one two three", ["two"], "one "),
        ("aaaab", ["aab"], "aa"),
        ("abcabd", ["abd", "bca"], "a"),
        ("hello 👋🏽 you", ["👋🏽"], "hello "),
        ("hello 👋🏽 you", ["🏽"], "hello 👋"),
        ("ends in st", ["stop"], "ends in st"),
        ("xyz", ["z", "yz", "xyz"], ""),
        ("a\n\nb", ["\n\n"], "a"),
    ]
    for text, stops, expected in cases:
        server.engine.script = Script(text=text, per_event=per_event)
        whole, _ = both(server, stop=stops)
        assert whole["choices"][0]["message"]["content"] == expected, (text, stops)
    server.engine.script = Script(text="before " + CALL + " after", per_event=per_event)
    whole, _ = both(server, stop=["days"], tools=[WEATHER])
    choice = whole["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Zürich 🙂", "'
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "days"), "half a call is no end in calls"


@pytest.mark.parametrize("per_event", [1, 2, 5, 20])
def test_case_26_calls_however_they_arrive_and_wherever_they_are_cut(server: Running, per_event: int) -> None:
    text = "Ja 🙂 " + CALL + '<tool_call>{"name": "shell", "input": "ls 🙂"}</tool_call>' + TICK
    size = len(text.encode())
    for max_tokens in range(1, size + 2, 3):
        server.engine.script = Script(text=text, per_event=per_event)
        whole, _ = both(server, tools=[WEATHER, CLOCK, SHELL], max_tokens=max_tokens)
        choice = whole["choices"][0]
        assert choice["finish_reason"] == ("length" if max_tokens < size else "tool_calls")
        calls = choice["message"].get("tool_calls", [])
        for call in calls[: len(calls) - (max_tokens < size)]:
            if call["type"] == "function":
                json.loads(call["function"]["arguments"])
