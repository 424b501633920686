"""What must be refused, and how: always OpenAI's shape, always the right `param`, never a 422 and never a 500."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

from service.api.app import Limits
from service.api.body import BodyLimits
from tests.api.fakes import CONTEXT, MODEL, Running, running

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
HUGE = 10**30
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def send(server: Running, content: bytes, path: str = CHAT, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", content=content, headers={"content-type": "application/json", **headers}, timeout=10)


def check(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error, whose form is always the same."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    for leak in ("Traceback", "/usr", "site-packages", "object at", "pydantic"):
        assert leak not in answer.text
    error: dict[str, Any] = body["error"]
    return error


NUMBERS: dict[str, list[Any]] = {
    "temperature": [-0.1, 2.1],
    "top_p": [-0.1, 1.1],
    "top_k": [-2, 2**31, 1.5],
    "min_p": [-1, 1.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, 101],
    "seed": [2**63, -(2**63) - 1, 1.5],
    "max_tokens": [0, -1, 2**31, 1.5],
    "n": [0, -1, 129, 10**9, 1.5],
    "min_tokens": [-1, 1.5],
    "priority": [2**31, 1.5],
    "timeout": [0, -1, 86_401],
}


@pytest.mark.parametrize(("field", "extra"), [("max_completion_tokens", [0, 2**31]), ("top_logprobs", [-1, 21, 10**9]), *NUMBERS.items()])
def test_numbers_out_of_range(server: Running, field: str, extra: list[Any]) -> None:
    start = time.monotonic()
    for value in [*extra, True, "5", "NaN", [], {}, HUGE, -HUGE]:
        assert check(server.chat(**{"logprobs": True, field: value}))["param"] == field, value
    for raw in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 5000):
        body = b'{"messages":[{"role":"user","content":"hi"}],"logprobs":true,"%s":%s}' % (field.encode(), raw)
        assert check(send(server, body))["param"] == field, raw
    assert time.monotonic() - start < 5
    assert server.engine.requests == []


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("messages", {}),
        ("messages", {"messages": None}),
        ("messages", {"messages": []}),
        ("messages", {"messages": "hi"}),
        ("messages", {"messages": HI * 4097}),
        ("messages[0]", {"messages": ["hi"]}),
        ("messages[0].role", {"messages": [{"content": "a"}]}),
        ("messages[1].role", {"messages": [*HI, {"role": "judge", "content": "a"}]}),
        ("messages[0].content", {"messages": [{"role": "user"}]}),
        ("messages[0].content", {"messages": [{"role": "assistant", "content": None}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": []}]}),
        ("messages[1].content[0].text", {"messages": [*HI, {"role": "user", "content": [{"type": "text"}]}]}),
        ("messages[0].content[1]", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}]}),
        ("messages[0].content[0].image_url", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("modalities[1]", {"messages": HI, "modalities": ["text", "audio"]}),
        ("modalities", {"messages": HI, "modalities": ["text", "image"]}),
        ("messages[0].content[0]", {"messages": [{"role": "user", "content": ["a"]}]}),
        ("messages[0].tool_call_id", {"messages": [{"role": "tool", "content": "a"}]}),
        ("messages[0].tool_calls", {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}),
        ("messages[0].name", {"messages": [{"role": "user", "content": "a", "name": "x" * 513}]}),
        ("stop", {"messages": HI, "stop": 5}),
        ("stop", {"messages": HI, "stop": ["a"] * 65}),
        ("stop", {"messages": HI, "stop": ""}),
        ("stop[1]", {"messages": HI, "stop": ["a", "x" * 257]}),
        ("logit_bias", {"messages": HI, "logit_bias": {"a": 1}}),
        ("logit_bias", {"messages": HI, "logit_bias": {"-1": 1}}),
        ("logit_bias", {"messages": HI, "logit_bias": {str(2**63): 1}}),
        ("logit_bias.5", {"messages": HI, "logit_bias": {"5": 101}}),
        ("logit_bias.5", {"messages": HI, "logit_bias": {"5": True}}),
        ("logit_bias", {"messages": HI, "logit_bias": {str(token): "a" for token in range(4097)}}),  # counted before it is looked at
        ("stop_token_ids[0]", {"messages": HI, "stop_token_ids": [-1]}),
        ("stop_token_ids[0]", {"messages": HI, "stop_token_ids": [True]}),
        ("stop_token_ids", {"messages": HI, "stop_token_ids": [2**30], "min_tokens": 1}),
        ("stream", {"messages": HI, "stream": 1}),
        ("stream_options", {"messages": HI, "stream_options": {"include_usage": True}}),
        ("stream_options.include_usage", {"messages": HI, "stream": True, "stream_options": {"include_usage": 1}}),
        ("logprobs", {"messages": HI, "logprobs": 2}),
        ("top_logprobs", {"messages": HI, "top_logprobs": 2}),
        ("min_tokens", {"messages": HI, "min_tokens": 9, "max_tokens": 8}),
        ("min_tokens", {"messages": HI, "min_tokens": CONTEXT}),
        ("seed", {"messages": HI, "seed": 2**63 - 1, "n": 2}),
        ("user", {"messages": HI, "user": "x" * 513}),
        ("cache_salt", {"messages": HI, "cache_salt": "x" * 513}),
        ("model", {"messages": HI, "model": 5}),
        ("metadata.a", {"messages": HI, "metadata": {"a": 1}}),
        ("metadata", {"messages": HI, "metadata": {str(key): 1 for key in range(65)}}),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(server: Running, param: str, body: dict[str, Any]) -> None:
    error = check(server.post(CHAT, **body))
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert server.engine.requests == []


@pytest.mark.parametrize(
    ("param", "prompt"),
    [
        ("prompt", None),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", {}),
        ("prompt", 5),
        ("prompt[0]", [""]),
        ("prompt[0]", [[]]),
        ("prompt[1]", ["a", 5]),
        ("prompt[0]", [-1]),
        ("prompt[0]", [1.5]),
        ("prompt[1]", [1, True]),
        ("prompt[0]", [2**63]),
        ("prompt[0][1]", [[1, -1]]),
        ("prompt", [2**20]),
        ("prompt", ["a"] * 100_000),
        ("prompt", [[1]] * 129),
    ],
)
def test_wrong_prompts_are_named(server: Running, param: str, prompt: Any) -> None:
    assert check(server.post("/v1/completions", prompt=prompt))["param"] == param
    assert server.engine.requests == []


UNBUILT: list[tuple[str, Any]] = [
    ("audio", {"voice": "x"}),
    ("chat_template", "{{ 7 }}"),
    ("documents", [{"text": "a"}]),
    ("mm_processor_kwargs", {"a": 1}),
    ("prompt_embeds", "AAAA"),
    ("use_beam_search", True),
    ("length_penalty", 1.5),
    ("lora_path", "a"),
]


@pytest.mark.parametrize(("field", "value"), UNBUILT)
def test_what_is_not_built_is_refused_and_not_ignored(server: Running, field: str, value: Any) -> None:
    error = check(server.chat(**{field: value}))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []), ("tool_choice", "none"), ("response_format", {"type": "text"}), ("modalities", ["text"]), ("best_of", 1),
        ("echo", False), ("metadata", {"a": "b"}), ("store", False), ("service_tier", "auto"), ("parallel_tool_calls", False),
        ("prediction", {"type": "content", "content": "a"}),
        ("safety_identifier", "x"), ("prompt_cache_key", "x"), ("chat_template_kwargs", {}),
        *((field, None) for field in ("tools", "stop", "n", "temperature", "max_tokens", "stream", "logit_bias", "model", "timeout")),
    ],
)  # fmt: skip
def test_what_asks_for_nothing_passes_without_a_warning(server: Running, field: str, value: Any) -> None:
    answer = server.chat(**{field: value})
    assert answer.status_code == 200
    assert "warnings" not in answer.json()


def test_messages_that_occur_in_practice(server: Running) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "7"},
        {"role": "system", "content": "late"},
        {"role": "assistant", "content": "So", "reasoning_content": "hm"},
    ]
    answer = server.post(CHAT, messages=messages)
    assert answer.status_code == 200
    assert "warnings" not in answer.json()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"a"', b"5", b"{}x", b"\xff", b"\xef\xbb\xbf{}", b'{"messages":[NaN]}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"messages":' + b"[" * 100_000, b'{"x":' + b"1" * 5000 + b"}",
        '{"messages":[]}'.encode("utf-16"), '{"messages":[]}'.encode("utf-32"),
        b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
    ],
)  # fmt: skip
def test_what_is_no_json_object(server: Running, body: bytes) -> None:
    start = time.monotonic()
    for path in (CHAT, "/v1/completions"):
        assert check(send(server, body, path))["type"] == "invalid_request_error"
    assert time.monotonic() - start < 2
    assert server.engine.requests == []


def test_half_a_surrogate_pair_is_named(server: Running) -> None:
    for path, field, param in (
        (CHAT, '"messages":[{"role":"user","content":"\\ud800"}]', "messages[0].content"),
        (CHAT, '"messages":[{"role":"user","content":[{"type":"text","text":"a\\udc00"}]}]', "messages[0].content[0].text"),
        ("/v1/completions", '"prompt":"\\ud800"', "prompt"),
        ("/v1/completions", '"prompt":["a","\\ud800"]', "prompt[1]"),
        ("/v1/completions", '"prompt":"a","stop":["a","\\ud800"]', "stop[1]"),
    ):
        assert check(send(server, b"{%s}" % field.encode(), path))["param"] == param


def test_odd_but_valid_json(server: Running) -> None:
    doubled = b'{"messages":[],"messages":[{"role":"user","content":"a\\u0000\\ud83d\\ude42"}]}'
    assert send(server, doubled).status_code == 200
    assert bytes(server.engine.requests[-1].prompt) == "user:a\0🙂\n".encode()


def test_media_types(server: Running) -> None:
    body = json.dumps({"messages": HI}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16", ""):
        check(send(server, body, **{"content-type": kind}), 415)
    check(send(server, body, **{"content-encoding": "gzip"}), 415)
    for kind in ("application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'):
        assert send(server, body, **{"content-type": kind}).status_code == 200


def test_bodies_have_a_limit() -> None:
    with running(limits=Limits(BodyLimits(max_bytes=100_000, idle_s=0.2))) as server:
        body = json.dumps({"messages": HI, "pad": "x" * 200_000}).encode()
        check(send(server, body), 413)

        def pieces() -> Any:
            for start in range(0, len(body), 10_000):
                yield body[start : start + 10_000]

        check(httpx.post(f"{server.url}{CHAT}", content=pieces(), headers={"content-type": "application/json"}), 413)
        assert send(server, json.dumps({"messages": HI, "pad": "x" * 90_000}).encode()).status_code == 200

        def slow() -> Any:
            yield b"{"
            time.sleep(0.6)
            yield b"}"

        late = check(httpx.post(f"{server.url}{CHAT}", content=slow(), headers={"content-type": "application/json"}), 408)
        assert late["code"] == "request_timeout"


def test_context_length(server: Running) -> None:
    room = CONTEXT - len("user:\n")
    assert server.chat("x" * (room - 1)).json()["choices"][0]["finish_reason"] == "length"
    for body in ({"content": "x" * room}, {"content": "x" * 10 * room}, {"content": "x" * (room - 8), "max_tokens": 9}):
        error = check(server.chat(**body))
        assert error["code"] == "context_length_exceeded"
        assert f"This model's maximum context length is {CONTEXT} tokens. However, " in error["message"]
    assert server.chat("x" * (room - 8), max_tokens=8).status_code == 200
    for name in ("max_tokens", "max_completion_tokens"):
        assert check(server.chat("x" * (room - 8), **{name: 9}))["param"] == name


def test_models(server: Running) -> None:
    error = check(server.chat(model="gpt-nothing"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert server.chat(model=MODEL).json()["model"] == server.chat().json()["model"] == MODEL


def test_paths_and_methods(server: Running) -> None:
    for method, path, status in (
        ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("POST", "/v1/nothing", 404), ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/nobody", 404), ("GET", CHAT, 405), ("DELETE", "/health", 405), ("PUT", "/v1/completions", 405),
        ("BREW", "/health", 405),
    ):  # fmt: skip
        answer = httpx.request(method, f"{server.url}{path}")
        check(answer, status)
        if status == 405:
            assert answer.headers["allow"] in ("GET, HEAD", "POST")
