"""A Responses request translated into a chat request: stored and new items into messages, flat tools and text.format into chat's own.

No HTTP and no engine. What chat finds wrong is told in the words of the Responses API. Called by the Responses routes.
Four parts, one after the other: what the model is to read, items as messages, tools and text.format, truncation.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from service.api.responses_schema import (
    CustomOutputItem,
    FlatAllowed,
    FlatCustom,
    FlatFunction,
    FlatNamed,
    FunctionOutputItem,
    InputItem,
    InputText,
    ItemReference,
    MessageItem,
    OutputRefusal,
    OutputText,
    PromptFields,
    ReasoningItem,
    ReasoningText,
    ResponsesRequest,
    SummaryText,
)
from service.api.responses_store import Item, ResponseStore
from service.errors import BraidError, RequestError

PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}
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
        (r"^reasoning_effort$", "reasoning.effort"),
        (r"^verbosity$", "text.verbosity"),
        (r"^messages\b.*$", "input"),
    )
)
_TURN_PLACE = 4  # a fourth of the context is kept for an answer of unknown length, but at most _TURN_TOKENS
_TURN_TOKENS = 1024


def new_id(kind: str) -> str:
    return f"{PREFIXES[kind]}_{uuid.uuid4().hex}"


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
    theirs = ours = error.param or ""
    for pattern, replacement in _RENAMES:
        ours = pattern.sub(replacement, ours)
    if ours != theirs:
        error.param = ours
        if error.message.startswith(theirs):
            error.message = ours + error.message.removeprefix(theirs)


# --- what the model is to read


@dataclass(frozen=True, slots=True)
class Context:
    """All items that a response answers to, oldest first: as JSON, and decoded."""

    stored: tuple[Item, ...]
    items: tuple[dict[str, Any], ...]


def context(wanted: PromptFields, store: ResponseStore, tenant: str) -> Context:
    """Raises: RequestError for a response or an item that is not stored, and for the output of a call that was not made."""
    stored = list(_previous(wanted.previous_response_id, store, tenant))
    num_before = len(stored)
    for index, item in enumerate(_given(wanted)):
        stored.append(_stored(item, f"input[{index}]", store, tenant))
    items = tuple(msgspec.json.decode(each.data) for each in stored)
    _check_calls(items, num_before)
    return Context(tuple(stored), items)


def _previous(response_id: str | None, store: ResponseStore, tenant: str) -> tuple[Item, ...]:
    if response_id is None:
        return ()
    response = store.get(tenant, response_id)
    if response is None:
        raise RequestError(
            "The response named by previous_response_id was not found: it was not stored, was deleted or evicted, or has not ended.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return response.items


def _given(wanted: PromptFields) -> list[InputItem]:
    given = wanted.input
    if isinstance(given, str):
        return [MessageItem(role="user", content=given)]
    return given or []


def _stored(item: InputItem, param: str, store: ResponseStore, tenant: str) -> Item:
    """Under the client's own id, unless that stands for another item already."""
    if isinstance(item, ItemReference):
        found = store.item(tenant, item.id)
        if found is None:
            raise RequestError(f"{param}.id: there is no stored item of this id", param=f"{param}.id", code="item_not_found")
        return found
    plain = _plain(item)
    if item.id is not None:
        own = Item(item.id, msgspec.json.encode({"id": item.id, **plain}))
        if store.item(tenant, item.id) in (None, own):
            return own
    fresh = new_id(item.type)
    return Item(fresh, msgspec.json.encode({"id": fresh, **plain}))


def _plain(item: Any) -> dict[str, Any]:
    """Without the id, in the one form that answers have too."""
    if isinstance(item, MessageItem):
        return {"type": "message", "role": item.role, "status": item.status or "completed", "content": _message_parts(item)}
    if isinstance(item, ReasoningItem):
        fields: dict[str, Sequence[SummaryText | ReasoningText]] = {"summary": item.summary, "content": item.content}
        texts = {name: [{"type": part.type, "text": part.text} for part in parts] for name, parts in fields.items()}
        return {"type": "reasoning", "status": item.status or "completed", **texts}
    known = item.model_dump(include=set(type(item).model_fields) - {"id", "output", "status"}, exclude_none=True)
    if isinstance(item, FunctionOutputItem | CustomOutputItem):
        output = item.output
        known["output"] = output if isinstance(output, str) else [{"type": "input_text", "text": _text(part)} for part in output]
    return {**known, "status": item.status or "completed"}


def _message_parts(item: MessageItem) -> list[dict[str, Any]]:
    parts = [InputText(type="input_text", text=item.content)] if isinstance(item.content, str) else item.content
    if item.role != "assistant":
        return [{"type": "input_text", "text": _text(part)} for part in parts]
    return [{"type": "refusal", "refusal": part.refusal} if isinstance(part, OutputRefusal) else output_text(part.text) for part in parts]


def _text(part: InputText | OutputText | OutputRefusal) -> str:
    return part.refusal if isinstance(part, OutputRefusal) else part.text


def output_text(text: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _check_calls(items: Sequence[dict[str, Any]], num_before: int) -> None:
    known: set[str] = set()
    for index, item in enumerate(items):
        if item["type"] in ("function_call", "custom_tool_call"):
            known.add(item["call_id"])
        elif item["type"].endswith("_output") and item["call_id"] not in known:
            param = f"input[{index - num_before}].call_id"
            raise RequestError(f"{param}: no call of this id comes before its output", param=param)


def ignored(wanted: PromptFields) -> Iterator[tuple[str, str]]:
    """Known fields that ask for what there is not: the field, and a text about it."""
    for index, item in enumerate(_given(wanted)):
        if isinstance(item, ReasoningItem) and item.encrypted_content is not None:
            param = f"input[{index}].encrypted_content"
            yield param, f"{param} can't be read and was ignored"
    options = wanted.reasoning
    if options is not None and (options.summary is not None or options.generate_summary is not None):
        yield "reasoning.summary", "reasoning.summary was ignored: reasoning is told whole, in content"
    if isinstance(wanted, ResponsesRequest) and "reasoning.encrypted_content" in wanted.include:
        yield "include", "reasoning.encrypted_content was ignored: reasoning is told in the clear, in content"


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
