"""A Responses request translated into a chat request: items into messages, flat tools and text.format into chat's own, truncation.

No HTTP and no engine. What chat finds wrong is told in the words of the Responses API. Called by the Responses routes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from service.api.responses_schema import FlatAllowed, FlatCustom, FlatFunction, FlatNamed, PromptFields, ResponsesRequest
from service.errors import BraidError, RequestError

# Fields that chat has under the same name.
_SAME = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "ignore_eos",
    "min_tokens",
    "stop_token_ids",
    "priority",
    "timeout",
    "cache_salt",
    "chat_template_kwargs",
    "moderation",
)
# Chat's names of fields, and ours for the same.
_RENAMES = tuple(
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"^tools\[(\d+)\]\.custom\.format\.grammar\b", r"tools[\1].format"),
        (r"^tools\[(\d+)\]\.(?:function|custom)\b", r"tools[\1]"),
        (r"^tool_choice\.allowed_tools\b", "tool_choice"),
        (r"^(tool_choice\S*?)\.(?:function|custom)\.name$", r"\1.name"),
        (r"^response_format(?:\.json_schema)?\b", "text.format"),
        (r"^max_(?:completion_)?tokens$", "max_output_tokens"),
        (r"^reasoning_effort\b", "reasoning.effort"),
        (r"^verbosity\b", "text.verbosity"),
        (r"^messages\b.*$", "input"),
    )
)
_TURN_PLACE = 4  # a fourth of the context is kept for an answer of unknown length, but at most _TURN_TOKENS
_TURN_TOKENS = 1024


@contextlib.contextmanager
def in_our_words() -> Iterator[None]:
    """Errors about chat's fields come out as errors about ours."""
    try:
        yield
    except BraidError as error:
        rename(error)
        raise


def rename(error: BraidError) -> None:
    """Mutates: the error's param and, where it begins with that, its message."""
    theirs = error.param or ""
    if (ours := renamed(theirs)) != theirs:
        error.param = ours
        if error.message.startswith(theirs):
            error.message = ours + error.message.removeprefix(theirs)


def renamed(text: str) -> str:
    """A field of a chat request, or a text that begins with one, as the client knows it."""
    for pattern, replacement in _RENAMES:
        text = pattern.sub(replacement, text)
    return text


# --- items as messages


def chat_body(wanted: PromptFields, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The JSON of a chat request; `body.checked` reads it. Raises: RequestError when there is nothing to answer to."""
    given = wanted.model_fields_set
    body: dict[str, Any] = {name: getattr(wanted, name) for name in _SAME if name in given}
    body["messages"] = messages(wanted.instructions, items)
    if not body["messages"]:
        raise RequestError("input must not be empty", param="input")
    if wanted.reasoning is not None and wanted.reasoning.effort is not None:
        body["reasoning_effort"] = wanted.reasoning.effort
    if wanted.text is not None and wanted.text.verbosity is not None:
        body["verbosity"] = wanted.text.verbosity
    if isinstance(wanted, ResponsesRequest):
        body |= _limits(wanted)
    return body | _tools(wanted) | _format(wanted)


def _limits(wanted: ResponsesRequest) -> dict[str, Any]:
    body: dict[str, Any] = {"stream": wanted.stream}
    if wanted.max_output_tokens is not None:
        body["max_completion_tokens"] = wanted.max_output_tokens
    if wanted.has_logprobs:
        body |= {"logprobs": True, "top_logprobs": wanted.top_logprobs or 0}
    return body


def messages(instructions: str | None, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reasoning, text and calls of one turn come together in one message of the assistant."""
    found: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    for item in items:
        kind = item["type"]
        if kind.endswith("_output"):
            found.append({"role": "tool", "tool_call_id": item["call_id"], "content": _chat_content(item["output"])})
        elif kind == "message" and item["role"] != "assistant":
            found.append({"role": item["role"], "content": _chat_content(item["content"])})
        else:
            _join(found, item)
    return found


def _join(found: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """Adds an assistant's item to its open message, or begins one. Mutates: found."""
    kind = item["type"]
    last = found[-1] if found and found[-1]["role"] == "assistant" else None
    if last is None or (kind == "message" and (last["content"] or "tool_calls" in last)) or (kind == "reasoning" and _has_spoken(last)):
        last = {"role": "assistant", "content": ""}
        found.append(last)
    if kind == "message":
        last["content"] = _chat_content(item["content"])
    elif kind == "reasoning":
        if text := _reasoning(item):
            last["reasoning_content"] = text
    else:
        last.setdefault("tool_calls", []).append(_chat_call(item))


def _has_spoken(message: dict[str, Any]) -> bool:
    return bool(message["content"]) or "tool_calls" in message or "reasoning_content" in message


def _reasoning(item: dict[str, Any]) -> str:
    return "".join(part["text"] for part in item["content"]) or "\n\n".join(part["text"] for part in item["summary"])


def _chat_call(item: dict[str, Any]) -> dict[str, Any]:
    if item["type"] == "custom_tool_call":
        return {"id": item["call_id"], "type": "custom", "custom": {"name": item["name"], "input": item["input"]}}
    return {"id": item["call_id"], "type": "function", "function": {"name": item["name"], "arguments": item["arguments"]}}


def _chat_content(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts = [part if part["type"] == "refusal" else {"type": "text", "text": part["text"]} for part in content]
    is_plain = len(parts) == 1 and parts[0]["type"] == "text"
    return parts[0]["text"] if is_plain else parts or ""


# --- tools and text.format


def _tools(wanted: PromptFields) -> dict[str, Any]:
    body: dict[str, Any] = {"tools": [_chat_tool(tool) for tool in wanted.tools]} if wanted.tools else {}
    # Without tools, auto asks for nothing.
    if wanted.tool_choice is not None and (wanted.tools or wanted.tool_choice != "auto"):
        body["tool_choice"] = _chat_choice(wanted.tool_choice)
    if not wanted.parallel_tool_calls:
        body["parallel_tool_calls"] = False
    return body


def _chat_tool(tool: FlatFunction | FlatCustom) -> dict[str, Any]:
    if isinstance(tool, FlatFunction):
        names = ("name", "description", "parameters", "strict")
        return {"type": "function", "function": {name: value for name in names if (value := getattr(tool, name)) is not None}}
    custom: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        custom["description"] = tool.description
    if tool.format is not None:
        grammar = {"grammar": {"syntax": tool.format.syntax, "definition": tool.format.definition}}
        custom["format"] = {"type": tool.format.type, **(grammar if tool.format.type == "grammar" else {})}
    return {"type": "custom", "custom": custom}


def _chat_choice(choice: str | FlatNamed | FlatAllowed) -> str | dict[str, Any]:
    if isinstance(choice, FlatAllowed):
        return {"type": choice.type, choice.type: {"mode": choice.mode, "tools": [_chat_named(named) for named in choice.tools]}}
    return _chat_named(choice) if isinstance(choice, FlatNamed) else choice


def _chat_named(named: FlatNamed) -> dict[str, Any]:
    return {"type": named.type, named.type: {"name": named.name}}


def _format(wanted: PromptFields) -> dict[str, Any]:
    form = wanted.text.format if wanted.text is not None else None
    if form is None or form.type == "text":
        return {}
    if form.type == "json_object":
        return {"response_format": {"type": "json_object"}}
    schema = {"name": form.name, "description": form.description, "schema": form.schema_, "strict": form.strict}
    return {"response_format": {"type": "json_schema", "json_schema": {key: value for key, value in schema.items() if value is not None}}}


# --- truncation: auto


def room_for_answer(max_output_tokens: int | None, context_len: int) -> int:
    """How many tokens truncation leaves free."""
    return max_output_tokens or min(_TURN_TOKENS, context_len // _TURN_PLACE)


async def fitting(
    items: Sequence[dict[str, Any]], most: int, count: Callable[[Sequence[dict[str, Any]]], Awaitable[int]]
) -> Sequence[dict[str, Any]]:
    """The items without as few of the oldest turns as make at most `most` tokens of them; instructions among them stay. When even the
    last turn is too long, it is what remains, and sending it says so. count: the tokens of items."""
    if await count(items) <= most:
        return items
    starts = [index for index, item in enumerate(items) if index and item["type"] == "message" and item["role"] == "user"]
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if await count(_from(items, starts[middle])) <= most else (middle + 1, high)
    return _from(items, starts[low]) if starts else items


def _from(items: Sequence[dict[str, Any]], start: int) -> list[dict[str, Any]]:
    kept = [item for item in items[:start] if item["type"] == "message" and item["role"] in ("system", "developer")]
    return [*kept, *items[start:]]
