"""What OpenAI's own types and (with OPENAI_SCHEMAS set) own schemas say about a response and its events, and a reader as strict as its
clients."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pydantic
from openai.types.responses import Response, ResponseStreamEvent

from tests.api.test_openapi import check as check_contract

_UNION = get_args(ResponseStreamEvent)[0]
EVENT_TYPES = {get_args(kind.model_fields["type"].annotation)[0] for kind in get_args(_UNION)}
_EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
TERMINAL = {"response.completed", "response.incomplete", "response.failed"}


def _relaxed(node: Any) -> Any:
    """An optional field may be null as well: every SDK reads that as absent, and OpenAI's own examples have it (usage, user)."""
    if isinstance(node, list):
        return [_relaxed(each) for each in node]
    if not isinstance(node, dict):
        return node
    found = {key: _relaxed(value) for key, value in node.items()}
    if isinstance(found.get("properties"), dict):
        needed = found.get("required", ())
        found["properties"] = {
            key: value if key in needed else {"anyOf": [value, {"type": "null"}]} for key, value in found["properties"].items()
        }
    return found


@functools.cache
def _definitions(path: str) -> dict[str, Any]:
    return dict(_relaxed(json.loads(Path(path).read_text(encoding="utf-8"))["$defs"]))


@functools.cache
def _official(name: str) -> jsonschema.Draft202012Validator | None:
    path = os.environ.get("OPENAI_SCHEMAS")
    if not path:
        return None
    definitions = _definitions(path)
    if name not in definitions:  # an event, by its type
        name = next(key for key, each in definitions.items() if name in each.get("properties", {}).get("type", {}).get("enum", ()))
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": definitions})


def check_official(data: Any, name: str) -> None:
    if (validator := _official(name)) is not None:
        validator.validate(data)


def check_response(body: dict[str, Any]) -> None:
    check_contract(body, "Response")
    Response.model_validate(body)
    check_official(body, "Response")


def check_events(events: Sequence[dict[str, Any]], first: int = 0) -> dict[str, Any]:
    """Each by itself, their numbers and their order. Returns the final response, as the deltas alone make it."""
    assert [event["sequence_number"] for event in events] == list(range(first, first + len(events)))
    for event in events:
        assert event["type"] in EVENT_TYPES
        check_contract(event, "ResponseEvent")
        _EVENT.validate_python(event)
        check_official(event, event["type"])
    final: dict[str, Any] = events[-1]["response"]
    assert events[-1]["type"] in TERMINAL
    assert sum(event["type"] in TERMINAL for event in events) == 1
    if not first:
        assert [event["type"] for event in events[:2]] in (
            ["response.created", "response.in_progress"],
            ["response.created", "response.queued"],
        )
        assert events[0]["response"]["output"] == []
        assert events[0]["response"]["usage"] is None
        assert without_status(_replayed(events)) == without_status(final["output"])
    return final


def without_status(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What broke off has no `done` event that would tell how it ended."""
    return [{key: value for key, value in item.items() if key != "status"} for item in items]


def _replayed(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output that a reader puts together who believes nothing but the steps, each checked against those before."""
    items: list[dict[str, Any]] = []
    open_index = None
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert open_index is None, "one item after the other"
            assert event["output_index"] == len(items)
            assert event["item"]["status"] == "in_progress"
            assert not event["item"].get("content")
            open_index = len(items)
            items.append(json.loads(json.dumps(event["item"])))
        elif "output_index" in event:
            assert event["output_index"] == open_index
            item = items[-1]
            if kind == "output_item.done":
                assert without_status([item]) == without_status([event["item"]])
                items[-1] = event["item"]
                open_index = None
                continue
            assert event["item_id"] == item["id"]
            _apply(item, kind, event)
    return items


def _apply(item: dict[str, Any], kind: str, event: dict[str, Any]) -> None:
    if kind == "content_part.added":
        assert event["content_index"] == len(item["content"])
        item["content"].append(dict(event["part"]))
    elif kind == "content_part.done":
        assert item["content"][event["content_index"]] == event["part"]
    elif kind in ("output_text.delta", "reasoning_text.delta"):
        part = item["content"][event["content_index"]]
        part["text"] += event["delta"]
        if "logprobs" in part:
            part["logprobs"] = part["logprobs"] + event["logprobs"]
    elif kind in ("output_text.done", "reasoning_text.done"):
        part = item["content"][event["content_index"]]
        assert part["text"] == event["text"]
        assert part.get("logprobs") == event.get("logprobs")
    elif kind in ("function_call_arguments.delta", "custom_tool_call_input.delta"):
        item["arguments" if "function" in kind else "input"] += event["delta"]
    else:
        name = "arguments" if "function" in kind else "input"
        assert item[name] == event[name]


def stable(body: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two runs of one request: ids and times."""
    text = json.dumps({**body, "created_at": 0, "completed_at": 0})
    ids = [body["id"], *(item["id"] for item in body["output"]), *(item.get("call_id", "-") for item in body["output"])]
    for place, name in enumerate(ids):
        text = text.replace(json.dumps(name), f'"id {place}"')
    return dict(json.loads(text))
