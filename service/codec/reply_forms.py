"""How calls are read, one function a form; several dialects can share one. What is no call raises NotACallError and becomes text.

Each takes the reader of a reply and the trigger that was found, "" at the start of the text without one. Called through `reply_dialects`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from service.codec.reply_calls import CallReader
from service.codec.reply_reader import NotACallError, Read

_NAME = re.compile(r"[A-Za-z0-9_.\-]*")


def read_tagged(calls: CallReader, trigger: str) -> Read[None]:
    """An object, or a list of them, in tags or a fence; bare at the start of the text."""
    first = yield from calls.space()
    if first == "[":
        yield from _list(calls)
    else:
        yield from calls.call_object() if trigger else calls.call_objects(";", ",")
    if trigger:
        yield from calls.skip(_CLOSING[trigger])


def _list(calls: CallReader) -> Read[None]:
    yield from calls.expect("[")
    yield from calls.call_objects(",")
    yield from calls.skip("]")


_CLOSING = {
    "<tool_call>": "</tool_call>",
    "<|tool_call|>": "<|/tool_call|>",
    **dict.fromkeys(("```json", "```tool_call", "```tool_code"), "```"),
}


def read_bare(calls: CallReader, trigger: str) -> Read[None]:
    """Objects in a row, with or without a separator."""
    yield from calls.call_objects(";", ",")


def read_mistral(calls: CallReader, trigger: str) -> Read[None]:
    """A list of objects, or a name and its arguments."""
    first = yield from calls.space()
    if first == "[":
        yield from _list(calls)
        return
    if first == "{":
        yield from calls.call_object()
        return
    calls.tool((yield from calls.word(_NAME)))
    if (yield from calls.literal("[CALL_ID]", "[ARGS]")) == "[CALL_ID]":
        yield from calls.word(_NAME)
        yield from calls.expect("[ARGS]")
    yield from calls.arguments()
    calls.end_call()


DS_CALLS, DS_CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
DS_CALL, DS_SEPARATOR, DS_CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def read_deepseek(calls: CallReader, trigger: str) -> Read[None]:
    """Calls in a section, each with its name behind the kind or first, and its arguments in a fence or bare."""
    if trigger == DS_CALLS:
        yield from calls.space()
        yield from calls.expect(DS_CALL)
    while True:
        name = yield from calls.word(_NAME)
        yield from calls.expect(DS_SEPARATOR)
        if (yield from calls.space()) not in ("{", '"', "<"):
            name = yield from calls.word(_NAME)
            yield from calls.space()
            yield from calls.expect("```json")
        calls.tool(name)
        yield from calls.arguments()
        calls.end_call()
        yield from calls.skip("```")
        yield from calls.skip(DS_CALL_END)
        if not (yield from calls.skip(DS_CALL)):
            yield from calls.skip(DS_CALLS_END)
            return


def read_xml(calls: CallReader, trigger: str) -> Read[None]:
    """A function tag with a tag for each parameter, whose text is a string where the schema says so and JSON elsewhere; or an object."""
    if trigger == "<tool_call>":
        if (yield from calls.space()) != "<":
            yield from calls.call_object()
            yield from calls.skip("</tool_call>")
            return
        yield from calls.expect("<function=")
    tool = calls.tool((yield from calls.word(_NAME)))
    yield from calls.expect(">")
    num_members = 0
    while (yield from _tag(calls, "<parameter=", "</function>")) == "<parameter=":
        pieces: list[str] = []
        if not (yield from calls.until(">", "\n", emit=pieces.append)).endswith(">"):
            raise NotACallError
        calls.begin()
        key = "".join(pieces)
        pieces.clear()
        ended = yield from calls.until("</parameter>", emit=pieces.append)
        value = "".join(pieces).removeprefix("\n").removesuffix("\n" if ended else "")
        if tool.kind == "function":
            calls.hand(("{" if not num_members else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
            value = _typed(value, tool.parameters or {}, key)
        calls.hand(value if ended or tool.kind == "custom" else value.removesuffix('"'))
        if not ended:
            raise NotACallError
        num_members += 1
    if num_members and tool.kind == "function":
        calls.hand("}")
    calls.end_call()
    yield from calls.skip("</tool_call>")


def _tag(calls: CallReader, *tags: str) -> Read[str]:
    yield from calls.space()
    tag = yield from calls.literal(*tags)
    if not tag:
        raise NotACallError
    return tag


def _typed(text: str, parameters: Mapping[str, Any], key: str) -> str:
    """The JSON of one parameter: a string unless the schema allows something else that the text spells."""
    properties = parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    is_enum = isinstance(schema, Mapping) and isinstance(schema.get("enum"), list) and text in schema["enum"]
    if kind != "string" and not is_enum:
        plain = text.strip()
        spelled = {"True": "true", "False": "false", "None": "null"}.get(plain, plain)
        try:
            value = json.loads(spelled, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return json.dumps(text, ensure_ascii=False)
        if not (isinstance(value, str) and kind is None):
            return spelled
    return json.dumps(text, ensure_ascii=False)


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


_ESCAPE = "<escape>"
_GEMMA_WORD = re.compile(r"[^\s,:{}\[\]<]*")


def read_function_gemma(calls: CallReader, trigger: str) -> Read[None]:
    """call:name{key:<escape>text<escape>,key:1}; the whole is known before it is handed on, because its values have to be translated."""
    yield from calls.expect("call:")
    tool = calls.tool((yield from calls.word(_NAME)))
    if (yield from calls.peek()) == "<":
        yield from calls.arguments()
    else:
        opened = yield from calls.literal('{"', "{")
        if opened == '{"':
            calls.at -= len(opened)
            yield from calls.arguments()
        elif not opened:
            raise NotACallError
        else:
            value = yield from _gemma_object(calls)
            calls.begin()
            if tool.kind == "custom":
                calls.hand(next((item for item in value.values() if isinstance(item, str)), ""))
            else:
                calls.hand(json.dumps(value, ensure_ascii=False))
    calls.end_call()
    yield from calls.skip("<end_function_call>")


def _gemma_value(calls: CallReader, depth: int) -> Read[Any]:
    if depth > 32:
        raise NotACallError
    first = yield from calls.space()
    if first == "{":
        yield from calls.expect("{")
        return (yield from _gemma_object(calls, depth + 1))
    if first == "[":
        yield from calls.expect("[")
        items: list[Any] = []
        while (yield from calls.space()) != "]":
            items.append((yield from _gemma_value(calls, depth + 1)))
            yield from calls.space()
            yield from calls.literal(",")
        yield from calls.expect("]")
        return items
    if (yield from calls.literal(_ESCAPE)):
        pieces: list[str] = []
        if not (yield from calls.until(_ESCAPE, emit=pieces.append)):
            raise NotACallError
        return "".join(pieces)
    word = yield from calls.word(_GEMMA_WORD)
    if not word:
        raise NotACallError
    try:
        return json.loads(word, parse_constant=_refuse_constant)
    except ValueError:
        return word


def _gemma_object(calls: CallReader, depth: int = 0) -> Read[dict[str, Any]]:
    """The members and the closing bracket of an object whose opening one was read."""
    members: dict[str, Any] = {}
    while (yield from calls.space()) != "}":
        key = yield from calls.word(_GEMMA_WORD)
        yield from calls.space()
        yield from calls.expect(":")
        members[key] = yield from _gemma_value(calls, depth)
        yield from calls.space()
        yield from calls.literal(",")
    yield from calls.expect("}")
    return members
