"""Tools and reasoning in chat: the choice among tools, calls and reasoning streamed and whole, the older form, custom tools.

Long: one test a rule of the contract.
"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.fakes import MODEL, Running, Script
from tests.api.test_chat import HI, content, events
from tests.api.test_openapi import check as conforms
from tests.api.test_validation import check

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
SHELL: dict[str, Any] = {"type": "custom", "custom": {"name": "shell", "format": {"type": "text"}}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
ARGUMENTS = '{"city": "Zürich 🙂", "days": [1, 2]}'
CALL = '<tool_call>{"name": "get_weather", "arguments": ' + ARGUMENTS + "}</tool_call>"
TICK = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
THINKING = [{"role": "user", "content": "<think>"}]


def assemble(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """A choice's message as a strict client adds it up; fails where a client would."""
    message: dict[str, Any] = {"role": None, "content": "", "reasoning": ""}
    calls: list[dict[str, Any]] = []
    ends = []
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        assert not ends, "nothing comes after the end"
        delta = choice["delta"]
        if "role" in delta:
            assert message["role"] is None, "the role comes once"
            message["role"] = delta["role"]
        message["content"] += delta.get("content", "")
        message["reasoning"] += delta.get("reasoning_content", "")
        assert delta.get("reasoning_content") == delta.get("reasoning")
        for call in delta.get("tool_calls", ()):
            add_call(calls, call)
        if choice["finish_reason"] is not None:
            assert delta == {}
            ends.append(choice["finish_reason"])
    assert len(ends) == 1
    return {**message, "tool_calls": calls, "finish_reason": ends[0]}


def add_call(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    kind = "custom" if "custom" in delta else "function"
    text = {"function": "arguments", "custom": "input"}[kind]
    if delta["index"] == len(calls):
        assert set(delta) == {"index", "id", "type", kind}, "id, type and name come with the first delta"
        assert delta[kind][text] == ""
        calls.append({"id": delta["id"], "type": delta["type"], kind: {**delta[kind]}})
        return
    assert delta["index"] == len(calls) - 1, "one call is finished before the next"
    assert set(delta) == {"index", kind}, "and only with the first"
    assert set(delta[kind]) == {text}
    assert isinstance(delta[kind][text], str)
    calls[-1][kind][text] += delta[kind][text]


def plain(choice: dict[str, Any]) -> dict[str, Any]:
    """A whole choice in the form of `assemble`."""
    message = choice["message"]
    assert message.get("reasoning_content") == message.get("reasoning")
    assert message.get("tool_calls") != []
    return {
        "role": message["role"],
        "content": message["content"] or "",
        "reasoning": message.get("reasoning", ""),
        "tool_calls": message.get("tool_calls", []),
        "finish_reason": choice["finish_reason"],
    }


PIECES = st.sampled_from(["Hm. ", "🙂", "é<", "<tool", "</tool_call>", "<think>a🙂b</think>", CALL, TICK, '<tool_call>{"name": 5}', "\n"])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(PIECES, max_size=5),
    per_event=st.sampled_from([1, 2, 5, 20]),
    n=st.sampled_from([1, 3]),
    is_parallel=st.booleans(),
    is_thinking=st.booleans(),
    max_tokens=st.one_of(st.none(), st.integers(1, 150)),
    stop=st.sampled_from([[], ["city"], ["🙂"], ["b</", "}<"]]),
    more=st.sampled_from([{}, {"logprobs": True}, {"return_token_ids": True}]),
)
def test_streamed_equals_whole(
    server: Running,
    pieces: list[str],
    per_event: int,
    n: int,
    is_parallel: bool,
    is_thinking: bool,
    max_tokens: int | None,
    stop: list[str],
    more: dict[str, Any],
) -> None:
    server.engine.script = Script(text="".join(pieces), per_event=per_event)
    body: dict[str, Any] = {"messages": THINKING if is_thinking else HI, "tools": [WEATHER, CLOCK], "n": n, "max_tokens": max_tokens}
    body |= {"parallel_tool_calls": is_parallel, "stop": stop, **more}
    whole = server.post("/v1/chat/completions", **body).json()
    chunks = events(server.post("/v1/chat/completions", **body, stream=True, stream_options={"include_usage": True}))
    conforms(whole, "ChatCompletion")
    for chunk in chunks:
        conforms(chunk, "ChatCompletionChunk")
    assert chunks[-1]["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        assert assemble(chunks, index) == plain(choice)
        own = [each for chunk in chunks for each in chunk["choices"] if each["index"] == index]
        entries = [entry for each in own for entry in (each["logprobs"] or {}).get("content", [])]
        assert entries == (choice["logprobs"] or {}).get("content", [])
        assert [token for each in own for token in each.get("token_ids", [])] == choice.get("token_ids", [])
        check_end(choice, is_parallel)
    server.engine.script = Script(text="".join(pieces), per_event=1)
    again = server.post("/v1/chat/completions", **body).json()
    assert (again["choices"], again["usage"]) == (whole["choices"], whole["usage"]), "however many tokens come at a time"


def check_end(choice: dict[str, Any], is_parallel: bool) -> None:
    """No end in calls whose arguments are not whole, and with one call at most, one call at most."""
    calls = choice["message"].get("tool_calls", [])
    if choice["finish_reason"] == "tool_calls":
        assert calls
        for call in calls:
            json.loads(call["function"]["arguments"])
    assert is_parallel or len(calls) <= 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "reason", "mode"),
    [(None, "tool_calls", "auto"), ("auto", "tool_calls", "auto"), ("required", "tool_calls", "required"), (NAMED, "stop", "required")],
)
def test_calls(server: Running, stream: bool, choice: Any, reason: str, mode: str) -> None:
    server.engine.script = Script(text=CALL, waits=0.001)
    answer = server.chat(tools=[WEATHER, CLOCK], tool_choice=choice, stream=stream)
    found = assemble(events(answer)) if stream else plain(answer.json()["choices"][0])
    assert (found["content"], found["finish_reason"]) == ("", reason)
    assert [call["function"] for call in found["tool_calls"]] == [{"name": "get_weather", "arguments": ARGUMENTS}]
    if not stream:
        assert answer.json()["choices"][0]["message"]["content"] is None
    offered = server.codec.asked["tools"]
    assert [tool.name for tool in offered.tools] == ["get_weather", "clock"]
    assert (offered.mode, offered.is_named) == (mode, choice is NAMED)
    assert offered.allowed == (("get_weather",) if choice is NAMED else ("get_weather", "clock"))
    sent = server.engine.requests[-1]
    assert sent.grammar == ("" if mode == "auto" else f"start: CALL_OF {' '.join(offered.allowed)} \n")
    assert sent.grammar_param == (None if mode == "auto" else "tools")


def test_no_calls_unless_they_are_allowed(server: Running) -> None:
    server.engine.script = Script(text=CALL)
    for fields in ({}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}, {"functions": [], "function_call": "none"}):
        message = server.chat(**fields).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": CALL, "refusal": None}
        assert server.codec.asked["tools"] is None


def test_only_the_allowed_tools(server: Running) -> None:
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]},
    }
    assert server.chat(tools=[WEATHER, CLOCK], tool_choice=choice).status_code == 200
    offered = server.codec.asked["tools"]
    assert (offered.allowed, offered.mode, offered.is_named) == (("clock",), "required", False)
    assert len(offered.tools) == 2, "the prompt tells of all, so that it stays the same"


def test_one_call_ends_a_choice_that_may_have_one(server: Running) -> None:
    server.engine.script = Script(text=CALL + TICK + "and so on", waits=0.0005)
    body = server.chat(tools=[WEATHER, CLOCK], parallel_tool_calls=False, n=2).json()
    for choice in body["choices"]:
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
    assert sorted(abort[1:] for abort in server.engine.aborts) == [(0, True), (1, True)]
    assert body["usage"]["completion_tokens"] == 2 * len(CALL.encode())


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_short_ends_with_length(server: Running, stream: bool) -> None:
    server.engine.script = Script(text=CALL)
    for choice in ("auto", "required", NAMED):
        answer = server.chat(tools=[WEATHER], tool_choice=choice, max_tokens=len(CALL.encode()) - 20, stream=stream)
        found = assemble(events(answer)) if stream else plain(answer.json()["choices"][0])
        assert found["finish_reason"] == "length"
        assert ARGUMENTS.startswith(found["tool_calls"][0]["function"]["arguments"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("text", "num_whole"), [(CALL[:-30], 0), (TICK + CALL[:-30], 1)])
def test_a_call_that_the_model_leaves_is_cut_short_too(server: Running, text: str, num_whole: int, stream: bool) -> None:
    """Nobody may take it for one that can be run."""
    server.engine.script = Script(text=text)
    answer = server.chat(tools=[WEATHER, CLOCK], stream=stream)
    found = assemble(events(answer)) if stream else plain(answer.json()["choices"][0])
    assert (found["finish_reason"], len(found["tool_calls"])) == ("length", num_whole + 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_in_a_call_ends_it(server: Running, stream: bool) -> None:
    for text, reason in ((CALL, "stop"), (TICK + "The city.", "tool_calls")):
        server.engine.script = Script(text=text)
        answer = server.chat(tools=[WEATHER, CLOCK], stop=["city"], stream=stream)
        choice = events(answer)[-1]["choices"][0] if stream else answer.json()["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == (reason, "city")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_come_and_has_hardly_begun_is_no_text(server: Running, stream: bool) -> None:
    server.engine.script = Script(text=CALL)
    for choice, expected in (("required", ""), ("auto", '<tool_call>{"name": "g')):
        answer = server.chat(tools=[WEATHER], tool_choice=choice, max_tokens=22, stream=stream)
        found = assemble(events(answer)) if stream else plain(answer.json()["choices"][0])
        assert (found["content"], found["tool_calls"], found["finish_reason"]) == (expected, [], "length")


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_has_both_names_and_is_counted(server: Running, stream: bool) -> None:
    server.engine.script = Script(text="Let me see 🙂</think>It is.")
    answer = server.post(
        "/v1/chat/completions", messages=THINKING, stream=stream, stream_options={"include_usage": True} if stream else None
    )
    found = assemble(events(answer)) if stream else plain(answer.json()["choices"][0])
    assert (found["reasoning"], found["content"], found["finish_reason"]) == ("Let me see 🙂", "It is.", "stop")
    usage = events(answer)[-1]["usage"] if stream else answer.json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len("Let me see 🙂</think>".encode())
    server.engine.script = Script(text="never ends")
    cut = server.post("/v1/chat/completions", messages=THINKING, max_tokens=5).json()
    assert (cut["choices"][0]["message"]["reasoning"], cut["choices"][0]["message"]["content"]) == ("never", "")
    assert cut["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5


@pytest.mark.parametrize("stream", [False, True])
def test_the_older_form(server: Running, stream: bool) -> None:
    functions = [WEATHER["function"], CLOCK["function"]]
    for call, reason in ((None, "function_call"), ("auto", "function_call"), ({"name": "get_weather"}, "stop")):
        server.engine.script = Script(text=CALL + TICK)
        answer = server.chat(functions=functions, function_call=call, stream=stream)
        if stream:
            chunks = events(answer)
            deltas = [chunk["choices"][0]["delta"]["function_call"] for chunk in chunks if "function_call" in chunk["choices"][0]["delta"]]
            assert deltas[0] == {"name": "get_weather", "arguments": ""}
            assert all(set(delta) == {"arguments"} for delta in deltas[1:])
            assert "".join(delta["arguments"] for delta in deltas) == ARGUMENTS
            assert chunks[-1]["choices"][0]["finish_reason"] == reason
        else:
            choice = answer.json()["choices"][0]
            assert choice["message"]["function_call"] == {"name": "get_weather", "arguments": ARGUMENTS}
            assert "tool_calls" not in choice["message"]
            assert choice["finish_reason"] == reason
            conforms(answer.json(), "ChatCompletion")


@pytest.mark.parametrize("stream", [False, True])
def test_custom_tools(server: Running, stream: bool) -> None:
    server.engine.script = Script(text='I run <tool_call>{"name": "shell", "input": "ls -l 🙂"}</tool_call>', per_event=3)
    answer = server.chat(tools=[SHELL, WEATHER], stream=stream)
    found = assemble(events(answer)) if stream else plain(answer.json()["choices"][0])
    assert found["content"] == "I run "
    assert found["tool_calls"] == [{"id": "call_0", "type": "custom", "custom": {"name": "shell", "input": "ls -l 🙂"}}]
    assert found["finish_reason"] == "tool_calls"
    grammar = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[a-z]+"}}
    server.chat(
        tools=[{"type": "custom", "custom": {"name": "sql", "format": grammar}}], tool_choice={"type": "custom", "custom": {"name": "sql"}}
    )
    tool = server.codec.asked["tools"].tools[0]
    assert (tool.kind, tool.syntax, tool.definition) == ("custom", "regex", "[a-z]+")


def test_history_reaches_the_template(server: Running) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "reasoning": "hm",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
                {"id": "2", "type": "custom", "custom": {"name": "shell", "input": 'echo "ü"'}},
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "function_call": {"name": "g", "arguments": "{}"}},
        {"role": "function", "name": "g", "content": "three"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "refusal", "refusal": "c"}]},
    ]
    answer = server.post("/v1/chat/completions", messages=messages)
    assert answer.status_code == 200, answer.text
    assert "warnings" not in answer.json()
    seen = server.codec.asked["messages"]
    assert seen[1]["reasoning_content"] == "hm"
    assert [call["function"] for call in seen[1]["tool_calls"]] == [
        {"name": "f", "arguments": '{"x":1}'},
        {"name": "shell", "arguments": '{"input": "echo \\"ü\\""}'},
    ]
    assert seen[4]["tool_calls"] == [{"type": "function", "function": {"name": "g", "arguments": "{}"}}]
    assert (seen[5]["role"], seen[5]["name"], seen[5]["content"]) == ("tool", "g", "three")


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("tool_choice", {"tool_choice": "auto"}),
        ("tool_choice", {"tool_choice": "required", "tools": []}),
        ("tool_choice", {"tool_choice": NAMED}),
        ("tool_choice", {"tool_choice": "always", "tools": [WEATHER]}),
        ("tool_choice", {"tool_choice": {"type": "file_search"}, "tools": [WEATHER]}),
        ("tool_choice.function", {"tool_choice": {"type": "function"}, "tools": [WEATHER]}),
        ("tool_choice.function.name", {"tool_choice": NAMED, "tools": [CLOCK]}),
        ("tool_choice.custom.name", {"tool_choice": {"type": "custom", "custom": {"name": "clock"}}, "tools": [CLOCK]}),
        (
            "tool_choice.allowed_tools.tools[0].function.name",
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}, "tools": [CLOCK]},
        ),
        ("tool_choice.allowed_tools.tools", {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}),
        ("tools", {"tools": {}}),
        ("tools", {"tools": [CLOCK] * 257}),
        ("tools[0]", {"tools": [{"type": "web_search"}]}),
        ("tools[0]", {"tools": [5]}),
        ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "x" * 65}}]}),
        ("tools[0].function.name", {"tools": [{"type": "function", "function": {}}]}),
        ("tools[0].function.parameters", {"tools": [{"type": "function", "function": {"name": "a", "parameters": "x"}}]}),
        ("tools[0].function.strict", {"tools": [{"type": "function", "function": {"name": "a", "strict": 1}}]}),
        ("tools[1].function.name", {"tools": [CLOCK, CLOCK]}),
        ("tools[1].custom.name", {"tools": [CLOCK, {"type": "custom", "custom": {"name": "clock"}}]}),
        ("tools[0].custom.format.grammar", {"tools": [{"type": "custom", "custom": {"name": "a", "format": {"type": "grammar"}}}]}),
        ("tools[0].custom.format.type", {"tools": [{"type": "custom", "custom": {"name": "a", "format": {"type": "xml"}}}]}),
        ("parallel_tool_calls", {"parallel_tool_calls": 1}),
        ("functions", {"functions": [CLOCK["function"]], "tools": [CLOCK]}),
        ("functions", {"functions": [CLOCK["function"]] * 2}),
        ("function_call", {"function_call": "auto"}),
        ("function_call", {"function_call": {"name": "no"}, "functions": [CLOCK["function"]]}),
        ("function_call", {"function_call": "auto", "tool_choice": "auto", "tools": [CLOCK]}),
        ("response_format.schema", {"tools": [CLOCK], "tool_choice": "required", "response_format": {"type": "json_object"}}),
        ("guided_regex", {"tools": [WEATHER], "tool_choice": NAMED, "guided_regex": "a"}),
        ("messages[0].tool_calls", {"messages": [{"role": "user", "content": "a", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]}),
        ("messages[0].tool_calls[0]", {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "search"}]}]}),
        ("messages[0].name", {"messages": [{"role": "function", "content": "a"}]}),
        ("messages[0].function_call", {"messages": [{"role": "user", "content": "a", "function_call": {"name": "f", "arguments": ""}}]}),
    ],
)  # fmt: skip
def test_what_can_not_be_is_named(server: Running, param: str, fields: dict[str, Any]) -> None:
    assert check(server.post("/v1/chat/completions", **{"messages": HI, **fields}))["param"] == param
    assert server.engine.requests == []


def test_a_form_of_output_beside_tools(server: Running) -> None:
    assert server.chat(tools=[WEATHER], response_format={"type": "json_object"}).status_code == 200
    assert server.engine.requests[-1].grammar.startswith("start: %json")


def test_openai_reads_calls(client: openai.OpenAI, server: Running) -> None:
    server.engine.script = Script(text="Look: " + CALL + TICK, per_event=4)
    answer = client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER, CLOCK])  # type: ignore[list-item]
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert [call.function.name for call in calls if call.type == "function"] == ["get_weather", "clock"]
    assert len({call.id for call in calls}) == 2
    with client.chat.completions.stream(model=MODEL, messages=HI, tools=[WEATHER, CLOCK]) as stream:  # type: ignore[list-item]
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert final.finish_reason == "tool_calls"
    assert [call.function.arguments for call in final.message.tool_calls or ()] == [ARGUMENTS, "{}"]


def test_openai_runs_pydantic_tools(client: openai.OpenAI, server: Running) -> None:
    import pydantic

    class GetWeather(pydantic.BaseModel):
        city: str
        days: list[int]

    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    server.engine.script = Script(text=CALL)
    answer = client.chat.completions.parse(model=MODEL, messages=HI, tools=[tool])
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.parsed_arguments == GetWeather(city="Zürich 🙂", days=[1, 2])
    assert "CALL_OF" in server.engine.requests[-1].grammar, "a strict tool is held to its schema"


def test_text_alone_is_told_by_the_short_way(server: Running) -> None:
    """Nothing of tools or reasoning is there when nothing asked for it."""
    chunks = events(server.chat(stream=True))
    assert content(chunks)
    assert all(set(chunk["choices"][0]["delta"]) <= {"role", "content"} for chunk in chunks)
