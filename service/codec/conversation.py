"""A conversation as chat templates expect it: roles, contents, calls and their results in the one form that they all read.

Takes messages in OpenAI's form and changes none of them. Knows no ids and renders nothing. Called by prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from service.codec.tools import INPUT_KEY, call_in_words, results_in_words

Message = dict[str, Any]

_ROLES = {"developer": "system", "function": "tool"}


def template_messages(messages: Sequence[Mapping[str, Any]], *, wants_none: bool = False, has_short_ids: bool = False) -> list[Message]:
    """content is one string, or with pictures a list of parts of the types image and text; developer is called system, the arguments of a
    call are an object, and a result has its tool's name.

    wants_none: the content of an assistant message that only calls is None. has_short_ids: ids of calls are nine letters and digits.
    """
    names: dict[str, str] = {}
    return [_message(message, names, wants_none, has_short_ids) for message in messages]


def _message(message: Mapping[str, Any], names: dict[str, str], wants_none: bool, has_short_ids: bool) -> Message:
    """Mutates: names, of the tools by the ids of their calls."""
    plain = {key: value for key, value in message.items() if value is not None}
    plain["role"] = _ROLES.get(plain.get("role", ""), plain.get("role"))
    plain["content"] = _content(plain.get("content", "")) or plain.pop("refusal", "")
    legacy = plain.pop("function_call", None)
    calls = plain.pop("tool_calls", None) or ([{"id": "", "type": "function", "function": legacy}] if legacy else [])
    if calls:
        plain["tool_calls"] = [_call(call) for call in calls]
        names.update((call.get("id", ""), call["function"].get("name", "")) for call in plain["tool_calls"])
        if wants_none and not plain["content"]:
            plain["content"] = None
    if plain["role"] == "tool" and plain.get("tool_call_id", "") in names:
        plain.setdefault("name", names[plain.get("tool_call_id", "")])
    thought = plain.get("reasoning_content") or plain.get("reasoning")
    if isinstance(thought, str):
        plain["reasoning_content"] = plain["reasoning"] = thought
    if has_short_ids:
        _shorten_ids(plain)
    return plain


def _content(content: Any) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    if any(part.get("type") == "image" for part in content):
        return [{"type": "image"} if part.get("type") == "image" else {"type": "text", "text": _text(part)} for part in content]
    return "\n".join(map(_text, content))


def _text(part: Mapping[str, Any]) -> str:
    return part.get("text") or part.get("refusal") or ""


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A custom tool's call is a function's whose one argument is the input."""
    custom = call.get("custom")
    if isinstance(custom, Mapping):
        function = {"name": custom.get("name", ""), "arguments": {INPUT_KEY: custom.get("input", "")}}
        return {"id": call.get("id", ""), "type": "function", "function": function}
    function = dict(call.get("function") or {})
    if isinstance(function.get("arguments"), str):
        function["arguments"] = _arguments(function["arguments"])
    return {**call, "function": function}


def _arguments(text: str) -> Any:
    if not text.strip():
        return {}
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # an answer cut short: the template sees what there is


def _shorten_ids(message: Message) -> None:
    if "tool_call_id" in message:
        message["tool_call_id"] = _short_id(message["tool_call_id"])
    for call in message.get("tool_calls", ()):
        call["id"] = _short_id(call.get("id", ""))


def _short_id(text: str) -> str:
    """The same for the same id."""
    if len(text) == 9 and text.isascii() and text.isalnum():
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:9]


def calls_in_words(messages: Sequence[Message]) -> list[Message]:
    """For a template that knows no calls: they go into the assistant's text, and results into a message of the user."""
    said: list[Message] = []
    results: list[str] = []
    for message in (*messages, None):
        if message is not None and message["role"] == "tool":
            results.append(message["content"])
            continue
        if results:
            said.append({"role": "user", "content": results_in_words(results)})
            results = []
        if message is not None:
            said.append(_called_in_words(message))
    return said


def told(messages: list[Message], text: str, *, has_system: bool) -> list[Message]:
    """With a text in the system message, or before the user's first words where no system message may be added."""
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages] if has_system else _told_to_user(messages, text)


def _told_to_user(messages: list[Message], text: str) -> list[Message]:
    at = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if at is None:
        return [{"role": "user", "content": text}, *messages]
    content = messages[at]["content"]
    before = f"{text}\n\n"
    asked = {**messages[at], "content": [{"type": "text", "text": before}, *content] if isinstance(content, list) else before + content}
    return [*messages[:at], asked, *messages[at + 1 :]]


def _called_in_words(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [call_in_words(call["function"].get("name", ""), call["function"].get("arguments", {})) for call in message["tool_calls"]]
    text = "\n".join(filter(None, (message["content"] or "", *calls)))
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": text}
