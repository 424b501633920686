"""Replies of every dialect as models write them, with what has to be found in them; and small templates after the families' conventions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import tokenizers
from tokenizers import models

from service.codec.reply import Parts, ReplyParser
from service.codec.reply_dialects import DIALECTS
from service.codec.reply_format import ReplyFormat
from service.codec.reply_parser import Marks
from service.codec.special import Special, SpecialTokens
from service.codec.tokenizer import Ends, Tokenizer
from service.codec.tools import Tool, ToolSet

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER = Tool("get_weather", "The weather.", parameters=SCHEMA)
NOW = Tool("get", "What is there.")
RUN = Tool("run", "Runs a command.", kind="custom")
TOOLS = (WEATHER, NOW, RUN)
THINK = Marks("<think>", "</think>")
BY_NAME = {dialect.name: dialect for dialect in DIALECTS}

EOS = "<|end|>"
CONTROL = (
    *(EOS, "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|tool_call|>", "<start_function_call>", "<end_function_call>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
)
# Beside the bytes and the control tokens, pieces that lie across the borders of what a grammar or a parser looks for.
PIECES = (b"<tool_call>", b"</think>", b'{"name": "', b'"}}', b'"}\n', "é".encode(), b'\\"')


def offered(*tools: Tool, mode: str = "auto", is_parallel: bool = True) -> ToolSet:
    return ToolSet(tools, tuple(tool.name for tool in tools), "required" if mode == "required" else "auto", is_parallel=is_parallel)


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes; then the control tokens, of which the first ends an answer, then PIECES."""
    pieces = [*(bytes([byte]) for byte in range(256)), *(b"" for _ in CONTROL), *PIECES]
    special = SpecialTokens(Special(256 + index, text) for index, text in enumerate(CONTROL))
    library = tokenizers.Tokenizer(models.BPE())
    return Tokenizer(pieces, special, Ends(None, (256,)), library, library)


def format_of(name: str, *, marks: Marks | None = None) -> ReplyFormat:
    return ReplyFormat(byte_tokenizer(), BY_NAME[name], marks, True, True)


@dataclass
class Heard:
    """A whole reply as a client puts it together; refuses deltas that break the rules of a stream."""

    reasoning: str = ""
    text: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)

    def add(self, parts: Parts) -> None:
        self.reasoning += parts.reasoning
        self.text += parts.text
        for delta in parts.calls:
            if delta.index == len(self.calls):
                assert delta.id
                assert delta.name
                self.calls.append((delta.name, delta.arguments))
            else:
                assert delta.index == len(self.calls) - 1, "one call is finished before the next begins"
                assert (delta.id, delta.name) == (None, None), "id and name come once"
                self.calls[-1] = (self.calls[-1][0], self.calls[-1][1] + delta.arguments)


def hear(parser: ReplyParser, pieces: Iterable[str]) -> Heard:
    heard = Heard()
    for piece in pieces:
        heard.add(parser.push(piece))
    heard.add(parser.finish())
    assert parser.has_calls is bool(heard.calls)
    return heard


def cut(text: str, size: int) -> Sequence[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


_OSLO = '{"city": "Os\\"lo]", "days": [1, {}]}'
_DS_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
_DS_SHORT = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
_BOTH = [("get_weather", _OSLO), ("get", "{}")]

# (dialect, the reply, its text, its calls)
REPLIES: tuple[tuple[str, str, str, list[tuple[str, str]]], ...] = (
    (
        "hermes",
        f'Sure!\n<tool_call>\n{{"name": "get_weather", "arguments": {_OSLO}}}\n</tool_call>'
        '\n<tool_call>{"name": "get"}</tool_call> Done. ',
        "Sure!\nDone. ",
        _BOTH,
    ),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "get"}</tool_call>', "", [("get", '{"a": 1}')]),
    ("hermes", '<tool_call>{"id": "x", "type": "function", "name": "get", "arguments": null, "more": [1]}', "", [("get", "{}")]),
    ("hermes", '<tool_call>{"name": "get", "arguments": "{\\"a\\": \\"\\ud83d\\ude00\\"}"}</tool_call>', "", [("get", '{"a": "😀"}')]),
    ("hermes", '<tool_call>{"name": "run", "arguments": {"input": "a\\n\\u00e9\\ud800"}}</tool_call>', "", [("run", "a\né�")]),
    ("hermes", '<tool_call>{"name": "run", "arguments": "ls"}</tool_call>', "", [("run", "ls")]),
    ("hermes", '{"name": "get", "arguments": {}}', "", [("get", "{}")]),
    (
        "hermes",
        '<tool_call>\n{"name": "nope", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "nope", "arguments": {}}\n</tool_call>',
        [],
    ),
    ("hermes", "Write <tool_call> first. <tool_call", "Write <tool_call> first. <tool_call", []),
    ("hermes", '<tool_call>{"na', '<tool_call>{"na', []),
    ("hermes", '<tool_call>{"name": "get", "arguments": {"a": "b\\', "", [("get", '{"a": "b\\')]),
    ("hermes", " \n Hello \n ", " \n Hello \n ", []),
    ("llama3", f'{{"name": "get_weather", "parameters": {_OSLO}}}; {{"name": "get", "parameters": {{}}}}', "", _BOTH),
    ("llama3", f'<|python_tag|>{{"name": "get_weather", "parameters": {_OSLO}}}\n{{"name": "get", "parameters": {{}}}}; or', "; or", _BOTH),
    ("llama3", '{"a": 1} is JSON', '{"a": 1} is JSON', []),
    ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{_OSLO}[TOOL_CALLS]get[CALL_ID]abcdefghi[ARGS]{{}}", "", _BOTH),
    ("mistral", "[TOOL_CALLS]nope[ARGS]{}", "[TOOL_CALLS]nope[ARGS]{}", []),
    (
        "mistral-list",
        f'Yes [TOOL_CALLS] [{{"name": "get_weather", "arguments": {_OSLO}}}, {{"name": "get", "arguments": {{}}}}] ',
        "Yes",
        _BOTH,
    ),
    (
        "qwen-xml",
        "Well\n<tool_call>\n<function=get_weather>\n<parameter=city>\n5\n</parameter>\n<parameter=days>\n5\n</parameter>\n"
        '<parameter=unit>\nC\n</parameter>\n</function>\n</tool_call>\n<tool_call>{"name": "get", "arguments": {}}</tool_call>',
        "Well",
        [("get_weather", '{"city": "5", "days": 5, "unit": "C"}'), ("get", "{}")],
    ),
    ("qwen-xml", "<function=run>\n<parameter=input>\nls\n\n</parameter>\n</function>", "", [("run", "ls\n")]),
    ("qwen-xml", "<function=get></function>", "", [("get", "{}")]),
    ("qwen-xml", '<function=get_weather><parameter=city>\nO"', "", [("get_weather", '{"city": "O\\"')]),
    (
        "function-gemma",
        "<start_function_call>call:get_weather{city:<escape>O}s,lo<escape>,days:5,unit:[1,<escape>x<escape>,{a:true}]}<end_function_call>"
        '<start_function_call>call:get{"a": 1}<end_function_call><start_function_call>call:run{input:<escape>ls<escape>}',
        "",
        [("get_weather", '{"city": "O}s,lo", "days": 5, "unit": [1, "x", {"a": true}]}'), ("get", '{"a": 1}'), ("run", "ls")],
    ),
    (
        "deepseek",
        f"Hm<｜tool▁calls▁begin｜>{_DS_CALL.format('get_weather', _OSLO)}\n{_DS_CALL.format('get', '{}')}<｜tool▁calls▁end｜>",
        "Hm",
        _BOTH,
    ),
    (
        "deepseek-v3.1",
        f"<｜tool▁calls▁begin｜>{_DS_SHORT.format('get_weather', _OSLO)}{_DS_SHORT.format('get', '{}')}<｜tool▁calls▁end｜>",
        "",
        _BOTH,
    ),
    ("granite", f'<|tool_call|>[{{"name": "get_weather", "arguments": {_OSLO}}}, {{"name": "get", "arguments": {{}}}}]', "", _BOTH),
    ("generic", 'So:\n```json\n{"name": "get", "arguments": {"a": 1}}\n```\nThere.', "So:\nThere.", [("get", '{"a": 1}')]),
    ("generic", '```json\n{"name": "Ada"}\n```', '```json\n{"name": "Ada"}\n```', []),
    ("generic", '[{"name": "get", "parameters": {}}, {"name": "nope"}]', ', {"name": "nope"}]', [("get", "{}")]),
)

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_JSON_TOOLS = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"

# The family's dialect, marks and conventions, in a template of a few lines.
TEMPLATES = {
    "hermes": (
        _JSON_TOOLS + "{% if tools %}Answer in <tool_call></tool_call>.{% endif %}" + CHATML + _CHATML_PROMPT,
        None,
    ),
    "hermes thinking": (
        _JSON_TOOLS
        + "{% if tools %}Answer in <tool_call></tool_call>.{% endif %}"
        + CHATML
        + _CHATML_PROMPT
        + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
        THINK,
    ),
    "deepseek": (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m['content'] is none %}<｜tool▁calls▁begin｜>```json"
        "{% else %}<｜User｜>{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
        THINK,
    ),
    "mistral": (
        "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% for m in messages %}[INST]{{ m.content }}[/INST]"
        "{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls[0].function.name }}[ARGS]{% endif %}{% endfor %}",
        None,
    ),
    "llama3": (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        '{% if loop.first and tools %}Respond in the format {"name": name, "parameters": {}}{{ tools | tojson }}{% endif %}'
        "{{ m.content }}<|eot_id|>{% endfor %}",
        None,
    ),
    "qwen-xml": (_JSON_TOOLS + "<function=x><parameter=y></tool_call>" + CHATML, None),
    "generic": (CHATML + _CHATML_PROMPT, None),
}
