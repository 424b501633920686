"""The real dialects behind the chat route: calls and reasoning as models write them, streamed and whole, byte by byte and in lumps."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.codec.reply_format import ReplyFormat, reply_format
from service.codec.template import ChatTemplate
from tests.api.fakes import ByteTokenizer, Running, Script
from tests.api.test_chat_equality import both
from tests.api.test_chat_tools import CLOCK, WEATHER

ARGUMENTS = {"city": 'Zür"ich\n🙂', "days": [1, {"a": None}]}
JSON = json.dumps(ARGUMENTS, ensure_ascii=False)
TAGGED = (
    f'<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)
# What the template holds, and two calls as such a model writes them.
FAMILIES: dict[str, tuple[str, str]] = {
    "hermes": ("<tool_call> <think></think>", TAGGED),
    "llama3": (
        '<|start_header_id|> "parameters": <think></think>',
        f'{{"name": "get_weather", "parameters": {JSON}}}; {{"name": "clock", "parameters": {{}}}}',
    ),
    "mistral": ("[TOOL_CALLS] [ARGS] <think></think>", f"[TOOL_CALLS]get_weather[ARGS]{JSON}[TOOL_CALLS]clock[ARGS]{{}}"),
    "mistral-list": (
        "[TOOL_CALLS] <think></think>",
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {JSON}}}, {{"name": "clock", "arguments": {{}}}}]',
    ),
    "generic": ("<think></think>", TAGGED),
}


def format_of(family: str) -> ReplyFormat:
    tools = "" if family == "generic" else "{% if tools %}{{ tools | tojson }}{% endif %}"
    signs = "{# " + FAMILIES[family][0] + " #}"
    template = ChatTemplate(tools + "{% for message in messages %}{{ message.role }}:{{ message.content }}{% endfor %}" + signs, {})
    return reply_format(template, ByteTokenizer())  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("per_event", [1, 2, 5, 20])
def test_calls_of_the_families(server: Running, monkeypatch: pytest.MonkeyPatch, family: str, per_event: int) -> None:
    calls = FAMILIES[family][1]
    own = format_of(family)
    assert own.dialect.name == family
    monkeypatch.setattr(server.codec, "format", own)
    text = f"<think>Which city? 🙂</think>{calls}"
    for fields in ({}, {"parallel_tool_calls": False}, {"n": 2}, {"max_tokens": 60}, {"max_tokens": len(text.encode()) - 9}):
        server.engine.script = Script(text=text, per_event=per_event)
        body: dict[str, Any] = {"tools": [WEATHER, CLOCK], **fields}
        choice = both(server, **body)[0]["choices"][0]
        message = choice["message"]
        assert message["reasoning_content"] == "Which city? 🙂"
        if "max_tokens" in fields:
            assert choice["finish_reason"] == "length"
            continue
        assert (message["content"], choice["finish_reason"]) == (None, "tool_calls")
        found = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]
        expected = [("get_weather", ARGUMENTS), ("clock", {})]
        assert found == expected[: 1 if "parallel_tool_calls" in fields else 2]


def test_what_must_be_called_goes_to_the_engine_as_a_grammar(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.codec, "format", format_of("hermes"))
    tools = [WEATHER, CLOCK]
    for choice in ("required", {"type": "function", "function": {"name": "clock"}}):
        assert server.chat(tools=tools, tool_choice=choice).status_code == 200
        grammar = server.engine.requests[-1].grammar
        assert "clock" in grammar
        assert ("get_weather" in grammar) == (choice == "required")
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    for fields, has_grammar in ((tools, False), ([strict], True)):
        assert server.chat(tools=fields).status_code == 200
        assert bool(server.engine.requests[-1].grammar) == has_grammar
    bad = {
        **WEATHER,
        "function": {**WEATHER["function"], "strict": True, "parameters": {"type": "object", "unknownKeyword": {}, "$dynamicRef": "#"}},
    }
    answer = server.chat(tools=[bad])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("tools[0].function.parameters")
