"""What a response answers to: items of stored responses, references and new items, each in the one form that answers have too.

No HTTP and no engine; nothing of chat. Called by the Responses routes.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from service.api.responses_schema import (
    CustomOutputItem,
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
from service.errors import RequestError

PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


def new_id(kind: str) -> str:
    return f"{PREFIXES[kind]}_{uuid.uuid4().hex}"


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
