"""Anthropic's Messages API, asked by the official SDK: what is understood, what comes back, whole and streamed, and errors in its form.

Long: one test a rule of the contract.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from service.api.app import Limits
from service.api.body import BodyLimits, checked
from service.api.messages_input import chat_request
from service.api.messages_schema import MessagesRequest
from service.errors import OverloadedError, RequestError, UnavailableError
from tests.api.conftest import eventually
from tests.api.fakes import CONTEXT, MODEL, TEXT, Running, Script, running
from tests.api.test_openapi import check as check_form

MESSAGES = "/v1/messages"
COUNT = f"{MESSAGES}/count_tokens"
HI = [{"role": "user", "content": "hi"}]
WEATHER = {
    "name": "weather",
    "description": "Tells the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


@pytest.fixture
def claude(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def ask(server: Running, path: str = MESSAGES, **more: object) -> httpx.Response:
    return server.post(path, **{"model": MODEL, "max_tokens": 500, "messages": HI, **more})


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """Every event names its type twice; the two have to be equal."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("\n\n")
    found = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        check_form(found[-1], "MessageEvent")
        assert name == f"event: {found[-1]['type']}"
    return found


def translated(**body: object) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    wanted = MessagesRequest.model_validate({"model": MODEL, "max_tokens": 9, "messages": HI, **body})
    wanted.check()
    return chat_request(wanted)


def test_a_message(server: Running, claude: anthropic.Anthropic) -> None:
    server.engine.script = Script(cached_tokens=3)
    message = claude.messages.create(
        model=MODEL,
        max_tokens=500,
        system="Be brief.",
        messages=[{"role": "user", "content": "hi"}],
        extra_body={"temperature": 0.5, "top_k": 7},
    )
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert message.id.startswith("msg_")
    assert [(block.type, block.text) for block in message.content if block.type == "text"] == [("text", TEXT)]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    prompt = "system:Be brief.\nuser:hi\n"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (len(prompt) - 3, 3)
    assert message.usage.output_tokens == len(TEXT.encode())
    (sent,) = server.engine.requests
    assert bytes(sent.prompt).decode() == prompt
    assert (sent.sampling.temperature, sent.sampling.top_k, sent.sampling.max_tokens) == (0.5, 7, 500)


@pytest.mark.parametrize(
    ("more", "reason", "sequence", "text"),
    [
        ({}, "end_turn", None, TEXT),
        ({"max_tokens": 3}, "max_tokens", None, "Gr"),
        ({"stop_sequences": ["x", "Stop"]}, "stop_sequence", "Stop", TEXT.partition("Stop")[0]),
    ],
)
@pytest.mark.parametrize("per_event", [1, 5, 100])
def test_ends_are_the_same_whole_and_streamed(
    server: Running, more: dict[str, Any], reason: str, sequence: str | None, text: str, per_event: int
) -> None:
    server.engine.script = Script(per_event=per_event)
    whole = ask(server, **more).json()
    start, ping, *blocks, delta, stop = events(ask(server, stream=True, **more))
    assert [block["text"] for block in whole["content"]] == [text] or text == "Gr"
    check_form(whole, "MessageAnswer")
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    assert start["message"] == {**start["message"], "content": [], "stop_reason": None, "stop_sequence": None}
    assert start["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert (ping, stop) == ({"type": "ping"}, {"type": "message_stop"})
    assert delta["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
    assert {**delta["usage"], "service_tier": "standard"} == whole["usage"]
    assert [event["type"] for event in blocks[:1] + blocks[-1:]] == ["content_block_start", "content_block_stop"]
    assert "".join(event["delta"]["text"] for event in blocks[1:-1]) == whole["content"][0]["text"]
    assert {event["index"] for event in blocks} == {0}


def test_the_streaming_helper(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model=MODEL, max_tokens=500, messages=[{"role": "user", "content": "hi"}]) as stream:
        assert "".join(stream.text_stream) == TEXT
        message = stream.get_final_message()
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == len(TEXT.encode())


@pytest.mark.parametrize("per_event", [1, 3, 1000])
def test_tools(server: Running, claude: anthropic.Anthropic, per_event: int) -> None:
    server.engine.script = Script(text=f"Let me see.{CALL}", per_event=per_event)
    given: dict[str, Any] = {"model": MODEL, "max_tokens": 500, "messages": HI, "tools": [WEATHER]}
    whole = claude.messages.create(**given)
    with claude.messages.stream(**given) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        text, call = message.content
        assert (text.type, text.text.strip() if text.type == "text" else "") == ("text", "Let me see.")
        assert call.type == "tool_use"
        assert (call.name, call.input) == ("weather", {"city": "Paris"})
        assert call.id.startswith("toolu_")
    kinds = [(event["type"], event.get("index")) for event in events(ask(server, stream=True, tools=[WEATHER]))]
    assert [kind for kind in kinds if "block_st" in kind[0]] == [
        ("content_block_start", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_stop", 1),
    ]


def test_a_call_that_breaks_off_is_not_to_be_run(server: Running) -> None:
    for text, more, reason in ((CALL[:-16], {}, "max_tokens"), (CALL, {"stop_sequences": ["Paris"]}, "stop_sequence")):
        server.engine.script = Script(text)
        whole = ask(server, tools=[WEATHER], **more).json()
        *_, delta, _ = events(ask(server, tools=[WEATHER], **more, stream=True))
        assert whole["stop_reason"] == delta["delta"]["stop_reason"] == reason
        assert [block["type"] for block in whole["content"]] == ["tool_use"]


def test_a_call_that_was_cut_short(server: Running) -> None:
    server.engine.script = Script(text=CALL)
    whole = ask(server, tools=[WEATHER], max_tokens=len(CALL) - 20).json()
    check_form(whole, "MessageAnswer")
    assert whole["stop_reason"] == "max_tokens"
    assert [block["type"] for block in whole["content"]] in ([], ["tool_use"])
    for block in whole["content"]:
        assert block["name"] == "weather"
        assert isinstance(block["input"], dict)


def test_thinking(server: Running, claude: anthropic.Anthropic) -> None:
    server.engine.script = Script(text="<think>Hm, Paris.</think>It rains.", per_event=4)
    given: dict[str, Any] = {"model": MODEL, "max_tokens": 500, "messages": HI, "thinking": {"type": "adaptive"}}
    whole = claude.messages.create(**given)
    with claude.messages.stream(**given) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        thinking, text = message.content
        assert thinking.type == "thinking"
        assert thinking.thinking.strip() == "Hm, Paris."
        assert thinking.signature
        assert text.type == "text"
        assert text.text.strip() == "It rains."
    assert whole.content[0] == streamed.content[0]


def test_counting_runs_nothing(server: Running, claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(model=MODEL, system="Be brief.", messages=[{"role": "user", "content": "hi"}])
    assert counted.input_tokens == len("system:Be brief.\nuser:hi\n")
    assert not server.engine.requests
    assert ask(server, system="Be brief.").json()["usage"]["input_tokens"] == counted.input_tokens


def test_conversations_are_translated() -> None:
    body, warnings = translated(
        system=[{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": "weather?"},
            {"role": "user", "content": [{"type": "text", "text": "In Paris."}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "rain"}]},
                    {"type": "text", "text": "And tomorrow?"},
                    {
                        "type": "document",
                        "title": "Plan",
                        "source": {"type": "text", "media_type": "text/plain", "data": "Go out."},
                    },
                ],
            },
        ],
        tools=[WEATHER],
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        stop_sequences=["END"],
        metadata={"user_id": "u1"},
    )
    assert body["messages"] == [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": [{"type": "text", "text": "weather?"}, {"type": "text", "text": "In Paris."}]},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "rain"},
        {"role": "user", "content": [{"type": "text", "text": "And tomorrow?"}, {"type": "text", "text": "Plan\nGo out."}]},
    ]
    assert body["tools"][0]["function"]["parameters"] == WEATHER["input_schema"]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert (body["parallel_tool_calls"], body["stop"], body["max_tokens"], body["user"]) == (False, ["END"], 9, "u1")
    where = "messages[2].content[1]"
    assert warnings == [(where, f"{where} was ignored: redacted thinking can't be read here")]
    assert "continue_final_message" not in body


@pytest.mark.parametrize(("choice", "ours"), [("auto", "auto"), ("any", "required"), ("none", "none")])
def test_choices(choice: str, ours: str) -> None:
    assert translated(tools=[WEATHER], tool_choice={"type": choice})[0]["tool_choice"] == ours


def test_thinking_and_output_are_translated() -> None:
    assert translated(thinking={"type": "disabled"})[0]["reasoning_effort"] == "none"
    assert translated(thinking={"type": "adaptive"})[0]["chat_template_kwargs"] == {"enable_thinking": True}
    assert translated(thinking={"type": "adaptive"}, output_config={"effort": "high"})[0]["reasoning_effort"] == "high"
    assert translated(thinking={"type": "enabled", "budget_tokens": 8})[1] == [
        ("thinking.budget_tokens", "thinking.budget_tokens is not enforced: max_tokens is the only limit")
    ]
    schema = {"type": "object", "properties": {}}
    body, _ = translated(output_config={"format": {"type": "json_schema", "schema": schema}})
    assert body["response_format"]["json_schema"]["schema"] == schema


def test_a_last_turn_of_the_assistant_is_continued(server: Running) -> None:
    assert ask(server, messages=[*HI, {"role": "assistant", "content": "Well,"}]).json()["content"][0]["text"] == TEXT
    assert bytes(server.engine.requests[-1].prompt).decode() == "user:hi\nassistant:Well,"


def test_results_need_their_calls() -> None:
    with pytest.raises(RequestError) as caught:
        translated(messages=[{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "no", "content": "x"}]}])
    assert caught.value.param == "messages[0].content[0].tool_use_id"
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "weather", "input": {}}]}
    with pytest.raises(RequestError, match="tool_result"):
        translated(messages=[*HI, call])


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png"}}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "url", "url": "x"}}]}]},
            "messages[0].content[0].source",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "messages[0].content[0]"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 500}}, "thinking.budget_tokens"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"max_tokens": CONTEXT}, "max_tokens"),
    ],
)
def test_bad_input_names_the_field(server: Running, more: dict[str, Any], param: str) -> None:
    answer = ask(server, **more)
    body = answer.json()
    assert answer.status_code == 400
    check_form(body, "MessagesError")
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["error"]["param"] == param
    assert body["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    assert not server.engine.requests


def test_a_prompt_that_is_too_long_says_so_in_their_words(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        claude.messages.create(model=MODEL, max_tokens=5, messages=[{"role": "user", "content": "x" * CONTEXT}])


def test_errors_have_the_clients_own_classes(server: Running, claude: anthropic.Anthropic) -> None:
    given: dict[str, Any] = {"model": MODEL, "max_tokens": 5, "messages": HI}
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(**{**given, "model": "claude-opus"})
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index, call-overload]
    assert missing.value.request_id
    server.engine.refusal = OverloadedError("full")
    with pytest.raises(anthropic.RateLimitError) as limited:
        claude.messages.create(**given)
    assert limited.value.body["error"]["type"] == "rate_limit_error"  # type: ignore[index, call-overload]
    assert limited.value.response.headers["retry-after"]
    server.engine.refusal = UnavailableError("loading")
    for path in (MESSAGES, COUNT):
        server.engine.state = "loading"
        body = ask(server, path).json()
        assert body["error"]["type"] == "overloaded_error"
    server.engine.state = "ready"
    server.engine.refusal = None
    server.engine.script = Script(error_after=0)
    assert ask(server).json()["error"]["type"] == "api_error"


def test_errors_in_the_middle_of_a_stream(server: Running, claude: anthropic.Anthropic) -> None:
    server.engine.script = Script(error_after=5)
    *_, last = events(ask(server, stream=True))
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    with pytest.raises(anthropic.APIStatusError), claude.messages.stream(model=MODEL, max_tokens=99, messages=HI) as stream:  # type: ignore[arg-type]
        stream.get_final_message()


def test_layers_in_front_speak_the_same_form() -> None:
    with running(api_keys=["first-key-123"]) as locked:
        for path in (MESSAGES, COUNT, f"{MESSAGES}/batches"):
            body = locked.post(path, model=MODEL).json()
            assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")
        assert "type" not in locked.post("/v1/messages-of-another-kind").json()
        with (
            anthropic.Anthropic(base_url=locked.url, api_key="wrong", max_retries=0) as client,
            pytest.raises(anthropic.AuthenticationError),
        ):
            client.messages.create(model=MODEL, max_tokens=5, messages=[{"role": "user", "content": "hi"}])
        with anthropic.Anthropic(base_url=locked.url, api_key="first-key-123", max_retries=0) as client:
            assert client.messages.create(model=MODEL, max_tokens=5, messages=[{"role": "user", "content": "hi"}]).content
        headers = {"x-api-key": "first-key-123", "content-type": "application/json", "anthropic-version": "any"}
        for method, path, kind, status in (
            ("GET", MESSAGES, "invalid_request_error", 405),
            ("POST", f"{MESSAGES}/batches", "not_found_error", 404),
        ):
            answer = httpx.request(method, locked.url + path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
        large = httpx.post(locked.url + MESSAGES, content=b"x" * (33 << 20), headers=headers)
        assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")


def test_unknown_fields_are_told(server: Running) -> None:
    answer = ask(server, color="red", thinking={"type": "enabled", "budget_tokens": 20})
    assert answer.json()["warnings"] == [
        "unknown field 'color' was ignored",
        "thinking.budget_tokens is not enforced: max_tokens is the only limit",
        "thinking has no effect on this model",
    ]
    assert "color" in answer.headers["x-braid-warnings"]
    first = events(ask(server, color="red", stream=True))[0]
    assert first["message"]["warnings"] == ["unknown field 'color' was ignored"]


def test_leaving_ends_the_work(server: Running) -> None:
    server.engine.script = Script(text="x" * 400, waits=0.01)
    with httpx.stream(
        "POST", f"{server.url}{MESSAGES}", json={"model": MODEL, "max_tokens": 400, "messages": HI, "stream": True}
    ) as answer:
        next(answer.iter_lines())
    eventually(server.is_idle)
    assert [event.finish for event in server.engine.ended] == ["abort"]


def test_a_strict_server_refuses_what_would_be_a_warning() -> None:
    with running(limits=Limits(BodyLimits(is_strict=True))) as strict:
        for more, param in (({"color": 1}, "color"), ({"thinking": {"type": "enabled", "budget_tokens": 20}}, "thinking.budget_tokens")):
            answer = ask(strict, **more)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert ask(strict).status_code == 200


def test_many_blocks_in_a_row_cost_no_more_each() -> None:
    blocks = [{"type": "text", "text": "a"}] * 1000
    wanted, _ = checked({"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": blocks}] * 40}, MessagesRequest)
    begin = time.monotonic()
    body, _ = chat_request(wanted)
    assert time.monotonic() - begin < 1
    assert body["messages"] == [{"role": "user", "content": blocks * 40}]
