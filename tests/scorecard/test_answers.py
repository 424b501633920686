"""Cases 14 to 17 and 23 to 28 of the scorecard: what comes out is what was asked for, whole or in pieces, alone or in a crowd."""

from __future__ import annotations

import json
import random
import re
import string
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pydantic_core
import pytest

from tests.api.fakes import Running, Script, running
from tests.scorecard.stand import CHAT, TEXT, Stand, error_of, events_of

HI = [{"role": "user", "content": "hi"}]


# --- 14 and 15: grammars that are none, and a neighbour who must not notice ---


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


BAD_SCHEMAS: list[Any] = [
    5, "string", [], True and [{}], {"type": "text"}, {"type": 5}, {"type": []}, {"type": ["string", "text"]}, {"type": {"a": 1}},
    {"properties": []}, {"properties": {"a": 5}}, {"properties": {"a": "string"}}, {"items": 5}, {"items": "string"},
    {"required": "a"}, {"required": [5]}, {"enum": []}, {"enum": "a"}, {"enum": {}}, {"anyOf": []}, {"anyOf": {}}, {"anyOf": [5]},
    {"oneOf": []}, {"allOf": []}, {"allOf": "a"}, {"minLength": -1}, {"minLength": "5"}, {"maxLength": 1.5}, {"maxLength": 10**9},
    {"minItems": -1}, {"maxItems": True}, {"minimum": "5"}, {"maximum": []}, {"multipleOf": 0}, {"multipleOf": -1}, {"multipleOf": "a"},
    {"pattern": 5}, {"pattern": "("}, {"pattern": "(?<=a)b"}, {"type": "string", "pattern": "(a)\\1"}, {"format": "nonsense"},
    {"$ref": "#/$defs/none"}, {"$ref": "http://example.invalid/schema.json"}, {"$ref": "file:///etc/passwd"}, {"$ref": 5}, {"$ref": "#"},
    {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"not": {}}, {"if": {}, "then": {}}, {"type": "array", "uniqueItems": True}, {"type": "array", "contains": {}},
    {"type": "object", "dependentRequired": {"a": ["b"]}}, {"propertyNames": {"pattern": "a"}}, {"type": "object", "nonsense": 1},
    {"type": "integer", "minimum": 5, "maximum": 4}, {"type": "string", "minLength": 5, "maxLength": 4},
    {"allOf": [{"type": "string"}, {"type": "integer"}]}, nested(100), {"enum": [str(i) for i in range(50_000)]},
    {"properties": {f"p{i}": {} for i in range(20_000)}}, {"type": "object", "properties": {"a": False}, "required": ["a"]}, False,
]  # fmt: skip


def as_property(schema: Any) -> dict[str, Any]:
    """Arguments are an object whatever their schema says, so there it stands a step deeper."""
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}


DOORS: list[tuple[str, Callable[[Any], dict[str, Any]]]] = [
    ("response_format", lambda schema: {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}),
    ("structured_outputs", lambda schema: {"structured_outputs": {"json": schema}}),
    (
        "tools",
        lambda schema: {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": as_property(schema), "strict": True}}],
            "tool_choice": "required",
        },
    ),
]


class Neighbour:
    """A long stream beside others: the seconds between its tokens."""

    def __init__(self, stand: Stand) -> None:
        self.gaps: list[float] = []
        self._stand = stand
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        body = {"prompt": "neighbour", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stream": True}
        while not self._is_over.is_set():
            with httpx.stream("POST", self._stand.url + TEXT, json=body, timeout=30) as answer:
                last = None
                for _ in answer.iter_raw():
                    now = time.perf_counter()
                    if last is not None:
                        self.gaps.append(now - last)
                    last = now


@pytest.mark.parametrize(
    ("door", "dress"), [pytest.param(*each, id=each[0], marks=[pytest.mark.long] * (each[0] == "tools")) for each in DOORS]
)
def test_case_14_schemas_that_are_none(stand: Stand, door: str, dress: Callable[[Any], dict[str, Any]]) -> None:
    slow = []
    assert len(BAD_SCHEMAS) >= 60
    with Neighbour(stand) as neighbour:
        for schema in BAD_SCHEMAS:
            begin = time.perf_counter()
            error = error_of(stand.chat("hi", **dress(schema)))
            slow.append(time.perf_counter() - begin)
            assert (error["param"] or "").startswith(door), (str(schema)[:200], error)
    assert sorted(slow)[-2] < 2
    assert sorted(neighbour.gaps)[-3] < 1


REGEXES = [
    "(a+)+$",
    "(a|aa)+$",
    "(a{1,99}){1,99}",
    "(.*)*" * 50,
    "(" * 5000 + ")" * 5000,
    "a{1000000}",
    "(x+x+)+y",
    ".{60000}b",
    "(a|b|c)*" * 2000,
    "[a-z]{1,5000}" * 100,
]


def test_case_15_catastrophic_regexes(stand: Stand) -> None:
    """Some of them are harmless to an automaton and then are followed; none may take long, for its sender or for others."""
    num_followed = 0
    with Neighbour(stand) as neighbour:
        for regex in REGEXES:
            seconds = []
            for seed in range(2):  # the better of two: what the server needs, not what the machine was busy with
                begin = time.perf_counter()
                answer = stand.complete("a", structured_outputs={"regex": regex}, max_tokens=20, seed=seed)
                seconds.append(time.perf_counter() - begin)
            assert min(seconds) < 2, regex[:50]
            if answer.status_code == 200:
                num_followed += 1
            else:
                assert error_of(answer)["param"] == "structured_outputs.regex"
    assert num_followed
    assert sorted(neighbour.gaps)[-3] < 1
    followed = stand.complete("a", structured_outputs={"regex": "(a+)+b"}, max_tokens=30, temperature=2, seed=1).json()["choices"][0]
    assert re.fullmatch("a+b" if followed["finish_reason"] == "stop" else "a+", followed["text"])


# --- 16: what a model of random weights writes under a schema ---


def some_schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["string", "integer", "boolean", "null", "enum", "number"] + (["object", "array", "any"] if depth < 3 else [])
    match chance.choice(kinds):
        case "object":
            names = chance.sample(string.ascii_lowercase, chance.randint(0, 4))
            properties = {name: some_schema(chance, depth + 1) for name in names}
            return {"type": "object", "properties": properties, "required": names[::2], "additionalProperties": False}
        case "array":
            return {
                "type": "array",
                "items": some_schema(chance, depth + 1),
                "minItems": chance.randint(0, 2),
                "maxItems": chance.randint(2, 4),
            }
        case "any":
            return {"anyOf": [some_schema(chance, depth + 1) for _ in range(chance.randint(1, 3))]}
        case "enum":
            return {"enum": chance.sample(["a", "b c", 'q"', 5, -1.5, None, True], chance.randint(1, 5))}
        case "string":
            return {"type": "string", "minLength": chance.randint(0, 2), "maxLength": chance.randint(2, 9)}
        case "integer":
            return {"type": "integer", "minimum": chance.randint(-500, 0), "maximum": chance.randint(1, 500)}
        case "number":
            return {"type": "number", "minimum": chance.randint(-9, 0), "maximum": chance.randint(1, 9)}
        case kind:
            return {"type": kind}


def test_case_16_what_follows_a_schema_validates(stand: Stand) -> None:
    chance = random.Random(16)
    schemas = [some_schema(chance) for _ in range(200)]

    def ask(number: int) -> dict[str, Any]:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schemas[number]}}
        body = {"prompt": "x", "response_format": form, "max_tokens": 120, "temperature": 2, "seed": number}
        answer = stand.client.post(stand.url + TEXT, json=body)
        assert answer.status_code == 200, (schemas[number], answer.text)
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice

    with ThreadPoolExecutor(8) as pool:
        choices = list(pool.map(ask, range(len(schemas))))
    ends = {"stop": 0, "length": 0}
    for schema, choice in zip(schemas, choices, strict=True):
        text = choice["text"]
        ends[choice["finish_reason"]] += 1
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(text), schema)
        else:
            pydantic_core.from_json(text.encode(), allow_partial="trailing-strings")
        outside = re.sub(r'"(?:[^"\\]|\\.)*("|$)', "", text)
        assert not re.search(r"\s{3,}", outside), text
    assert ends["stop"] > 150


def test_case_17_templates_are_not_the_clients(stand: Stand) -> None:
    for template in ("{{ 7 * 7 }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ ''.__class__ }}"):
        assert error_of(stand.chat(chat_template=template))["param"] == "chat_template"
    odd: list[Any] = [
        5,
        "a",
        [],
        {"tokenize": True},
        {"chat_template": "{{ 7 }}"},
        {"messages": "a"},
        {"x": {"y": 1}},
        {"x": []},
        {"a" * 600: 1},
    ]
    odd += [{str(i): 1 for i in range(100)}, {"x": "y" * 5000}]
    for kwargs in odd:
        assert (error_of(stand.chat(chat_template_kwargs=kwargs))["param"] or "").startswith("chat_template_kwargs"), kwargs


# --- 23: in pieces as in one ---


def joined(chunks: list[dict[str, Any]]) -> tuple[str, str | None, Any]:
    """(text, end, usage) of a chat stream, whose first chunk alone has the role and which has one end."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [index for index, choice in enumerate(choices) if "role" in choice["delta"]] == [0]
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert len(ends) == 1
    assert choices[-1]["finish_reason"] == ends[0]
    return "".join(choice["delta"].get("content") or "" for choice in choices), ends[0], chunks[-1]["usage"]


def test_case_23_streamed_or_not(stand: Stand) -> None:
    for number in range(50):
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 5 + number % 20, "seed": number}
        if number % 5 == 1:
            options |= {"logprobs": True, "top_logprobs": 2}
        if number % 5 == 2:
            options |= {"stop": ["e", "\r*"], "include_stop_str_in_output": number % 2 == 0}
        if number % 5 == 3:
            options |= {"temperature": 1.5, "ignore_eos": True}
        text = f"prompt {number} " * (1 + number % 3)
        whole = stand.chat(text, **options).json()
        streamed = stand.chat(text, stream=True, stream_options={"include_usage": True}, **options)
        (choice,) = whole["choices"]
        content, end, usage = joined(events_of(streamed.text))
        assert (content, end) == (choice["message"]["content"], choice["finish_reason"])
        cached = ("prompt_tokens_details",)
        assert {k: v for k, v in usage.items() if k not in cached} == {k: v for k, v in whole["usage"].items() if k not in cached}


# --- 24 to 26: exactly what was generated, with the texts chosen (a scripted engine) ---


@pytest.fixture(scope="module")
def scripted() -> Iterator[Running]:
    with running() as server:
        yield server


def test_case_24_characters_are_never_cut(scripted: Running, stand: Stand) -> None:
    text = "aé–🦙👩‍👩‍👧‍👦e\u0301\u200dzß中文字\U0010ffff."
    for per_event in range(1, 7):
        scripted.engine.script = Script(text=text, per_event=per_event)
        chunks = events_of(scripted.chat(stream=True, stream_options={"include_usage": True}).text)
        assert joined(chunks)[0] == text
    # Bytes at random are no text: the same stand-ins at the same places, however they come.
    for seed in range(8):
        options = {"max_tokens": 60, "temperature": 2, "seed": seed}
        whole = stand.complete("x", **options).json()["choices"][0]["text"]
        pieces = [choice["text"] for chunk in events_of(stand.complete("x", stream=True, **options).text) for choice in chunk["choices"]]
        assert "".join(pieces) == whole


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one STO two STOP", ["STOP"], "one STO two "),
        ("aaab", ["aab"], "a"),
        ("ababac!", ["abac"], "ab"),
        ("x🦙y🦙🦙z", ["🦙🦙"], "x🦙y"),
        ("no end in sight ST", ["STOP"], "no end in sight ST"),
        ("both END and STOP", ["STOP", "END"], "both "),
        ("prefix", ["prefix", "pre"], ""),
        ("line\n\nline", ["\n\n"], "line"),
    ],
)
def test_case_25_stop_strings(scripted: Running, text: str, stop: list[str], kept: str) -> None:
    for per_event in (1, 2, 3, 5, 50):
        scripted.engine.script = Script(text=text, per_event=per_event)
        whole = scripted.chat(stop=stop).json()["choices"][0]
        streamed = joined(events_of(scripted.chat(stop=stop, stream=True, stream_options={"include_usage": True}).text))
        assert whole["message"]["content"] == streamed[0] == kept, per_event
        assert whole["finish_reason"] == streamed[1] == "stop"


def calls_of(chunks: list[dict[str, Any]]) -> tuple[list[dict[str, str]], str]:
    """The calls that a stream's deltas spell, and its end. Index, id and name come once, indexes without gaps."""
    calls: list[dict[str, str]] = []
    end = ""
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        end = choice["finish_reason"] or end
        for delta in choice["delta"].get("tool_calls") or ():
            if "id" in delta:
                assert delta["index"] == len(calls)
                assert delta["type"] == "function"
                calls.append({"name": delta["function"]["name"], "arguments": ""})
            assert delta["index"] == len(calls) - 1, "one call is finished before the next"
            calls[-1]["arguments"] += delta["function"].get("arguments", "")
    return calls, end


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("max_tokens", [300, 25])
def test_case_26_tool_calls_in_pieces(stand: Stand, max_tokens: int) -> None:
    """A grammar makes even random weights call: the same calls whole and in pieces, valid unless they were cut."""
    tools = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
    ends = []
    for seed in range(6):
        options = {
            "tools": tools,
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "temperature": 1.5,
            "seed": seed,
            "max_tokens": max_tokens,
        }
        whole = stand.post(CHAT, messages=HI, **options).json()["choices"][0]
        calls, end = calls_of(events_of(stand.post(CHAT, messages=HI, stream=True, **options).text))
        assert calls == [
            {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
            for call in whole["message"].get("tool_calls") or ()
        ]
        assert end == whole["finish_reason"]
        ends.append(end)
        if end == "tool_calls":
            (call,) = calls
            assert call["name"] == "weather"
            jsonschema.validate(json.loads(call["arguments"]), PARAMETERS)
    assert ends == (["tool_calls"] * 6 if max_tokens == 300 else ["length"] * 6)


# --- 27 and 28: alone as in a crowd ---


def test_case_27_neighbours_change_nothing(stand: Stand) -> None:
    body = {"prompt": "the one that counts", "max_tokens": 100, "temperature": 0, "ignore_eos": True, "return_token_ids": True}

    def ask() -> list[int]:
        ids: list[int] = stand.client.post(stand.url + TEXT, json=body).json()["choices"][0]["token_ids"]
        return ids

    alone = ask()
    assert len(alone) == 100
    crowd = [{**body, "prompt": f"somebody else {number} " * (number + 1), "temperature": 1, "seed": number} for number in range(7)]
    for _ in range(2):
        with ThreadPoolExecutor(8) as pool:
            others = [pool.submit(stand.client.post, stand.url + TEXT, json=each) for each in crowd]
            time.sleep(0.02)
            assert ask() == alone
            assert all(other.result().status_code == 200 for other in others)


def test_case_28_request_ids_are_ours(stand: Stand) -> None:
    """Twenty at once under one id and one seed: each gets the answer to its own question."""
    headers = {"x-request-id": "the-same"}

    def ask(number: int) -> tuple[str, str, str]:
        body = {"prompt": f"question {number}", "max_tokens": 20, "temperature": 1, "seed": 7}
        answer = stand.client.post(stand.url + TEXT, json=body, headers=headers)
        return answer.json()["id"], answer.headers["x-request-id"], answer.json()["choices"][0]["text"]

    alone = [ask(number)[2] for number in range(20)]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(ask, range(20)))
    assert [text for _, _, text in together] == alone
    assert len(set(alone)) > 1
    assert {echoed for _, echoed, _ in together} == {"the-same"}
    assert len({own for own, _, _ in together}) == 20
