"""The machine that turns pieces into a response: whole and streamed say the same however a reply is cut, and events follow the rules
that OpenAI's clients insist on."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.api.choice import Piece
from service.api.responses_schema import ResponsesRequest
from service.api.responses_shape import ResponseAnswer, head
from service.codec.reply import CallDelta
from service.engine.messages import TokenLogprob
from service.errors import BraidError, EngineError, OverloadedError, RequestError, UnavailableError
from tests.api.fakes import ByteTokenizer
from tests.api.openai_forms import check_events, check_response, stable

USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 2},
}


def answer(*, has_logprobs: bool = False, **fields: Any) -> tuple[ResponseAnswer, list[dict[str, Any]]]:
    """A response, and the list of its bodies as they were at its end."""
    ends: list[dict[str, Any]] = []
    wanted = ResponsesRequest.model_validate({"input": "hi", **fields})
    own = head(wanted, f"resp_{0:032x}", "tiny", {"temperature": 1.0, "top_p": 1.0}, [])
    generation: Any = SimpleNamespace(usage=lambda: USAGE)
    made = ResponseAnswer(
        own,
        generation,
        ByteTokenizer(),
        has_logprobs=has_logprobs,
        on_end=lambda each: ends.append(each.body()),  # type: ignore[arg-type]
    )
    return made, ends


def read(data: bytes) -> list[dict[str, Any]]:
    events = []
    for text in data.decode().removesuffix("\n\n").split("\n\n"):
        name, line = text.split("\n")
        events.append(json.loads(line.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def streamed(pieces: list[Piece], **options: Any) -> list[dict[str, Any]]:
    made, ends = answer(**options)
    data = made.opening() + b"".join(map(made.chunk, pieces)) + made.closing()
    events = read(data)
    assert ends == [events[-1]["response"]]
    return events


def whole(pieces: list[Piece], **options: Any) -> dict[str, Any]:
    made, ends = answer(**options)
    for piece in pieces:
        made.add(piece)
    body: dict[str, Any] = json.loads(made.whole())
    assert ends == [body]
    return body


def pieces_of(reply: list[Any], cuts: list[int], finish: str) -> list[Piece]:
    """A reply as pieces: its parts cut into bits whose lengths are drawn from `cuts`, in turn."""
    pieces: list[Piece] = []
    turn = num_calls = 0
    for kind, text in reply:
        bits = []
        while text:
            length = cuts[turn % len(cuts)]
            turn += 1
            bits.append(text[:length])
            text = text[length:]
        if kind == "text":
            pieces += [Piece(0, bit) for bit in bits]
        elif kind == "reasoning":
            pieces += [Piece(0, "", reasoning=bit) for bit in bits]
        else:
            pieces.append(Piece(0, "", calls=[CallDelta(num_calls, f"call_{num_calls}", "tool", "", kind)]))
            pieces += [Piece(0, "", calls=[CallDelta(num_calls, arguments=bit, kind=kind)]) for bit in bits]
            num_calls += 1
    return [*pieces, Piece(0, "", finish=finish)]


KINDS = {"text": "message", "function": "function_call", "custom": "custom_tool_call"}


def expected(reply: list[Any]) -> list[tuple[str, str]]:
    """Items with their texts: neighbours of one kind are one item, and a text of nothing but blanks is none."""
    found: list[tuple[str, str]] = []
    for kind, group in itertools.groupby(reply, key=lambda part: part[0]):
        texts = [text for _, text in group]
        joined = texts if kind in ("function", "custom") else ["".join(texts)]
        if kind == "reasoning" and found and found[-1][0] == "reasoning":  # only blanks were between
            found[-1] = ("reasoning", found[-1][1] + joined[0])
            continue
        found += [(KINDS.get(kind, kind), text) for text in joined if kind != "text" or not text.isspace()]
    return found


TEXTS = st.text(alphabet='aé👋\n"{', min_size=1, max_size=12)
REPLIES = st.lists(st.tuples(st.sampled_from(["text", "reasoning", "function", "custom"]), TEXTS), max_size=5)
CUTS = st.lists(st.integers(1, 20), min_size=1, max_size=4)


@given(REPLIES, CUTS, CUTS, st.sampled_from(["stop", "tool_calls", "length"]))
@example([("reasoning", "a"), ("text", "\n"), ("reasoning", "a")], [1], [1], "stop")
def test_streamed_and_whole_are_the_same_however_cut(reply: list[Any], cuts: list[int], others: list[int], finish: str) -> None:
    events = streamed(pieces_of(reply, cuts, finish))
    final = check_events(events)
    body = whole(pieces_of(reply, others, finish))
    check_response(body)
    assert stable(final) == stable(body)
    assert body["status"] == ("incomplete" if finish == "length" else "completed")
    assert events[-1]["type"] == f"response.{body['status']}"
    assert body["incomplete_details"] == ({"reason": "max_output_tokens"} if finish == "length" else None)
    said = [(item["type"], item.get("arguments") or item.get("input") or item["content"][0]["text"]) for item in body["output"]]
    assert said == (expected(reply) or [("message", "".join(text for _, text in reply))])
    statuses = [item["status"] for item in body["output"]]
    assert statuses == ["completed"] * (len(statuses) - 1) + ["incomplete" if finish == "length" else "completed"]


def test_one_piece_may_bring_everything() -> None:
    calls = [CallDelta(0, "call_a", "first", "{}"), CallDelta(1, "call_b", "second", '{"a"'), CallDelta(1, arguments=":1}")]
    pieces = [Piece(0, "text", finish="tool_calls", reasoning="thought", calls=calls)]
    final = check_events(streamed(pieces))
    assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert [item["arguments"] for item in final["output"][2:]] == ["{}", '{"a":1}']
    assert stable(final) == stable(whole(pieces))


def test_the_rest_of_a_call_comes_before_the_text_after_it() -> None:
    """Several tokens may come at once, and a piece tells its text before its calls."""
    calls = [CallDelta(0, arguments='"b"]'), CallDelta(1, "call_b", "second", "{}")]
    pieces = [Piece(0, "", calls=[CallDelta(0, "call_a", "first", '["a",')]), Piece(0, "and", calls=calls), Piece(0, "", finish="stop")]
    final = check_events(streamed(pieces))
    said = [item.get("arguments") or item["content"][0]["text"] for item in final["output"]]
    assert said == ['["a","b"]', "and", "{}"]


def test_logprobs_come_with_their_text() -> None:
    def token(char: str) -> tuple[int, TokenLogprob]:
        return ord(char), TokenLogprob(-0.5, [(ord(char), -0.5)])

    pieces = [
        Piece(0, "", [token("r")], reasoning="r"),
        Piece(0, "", [token("<")]),
        Piece(0, "a", [token("a")]),
        Piece(0, "bc", [token("b"), token("c")]),
        Piece(0, "", finish="stop"),
    ]
    events = streamed(pieces, has_logprobs=True)
    final = check_events(events)
    deltas = [[entry["token"] for entry in event["logprobs"]] for event in events if event["type"] == "response.output_text.delta"]
    assert deltas == [["<", "a"], ["b", "c"]]
    entries = final["output"][1]["content"][0]["logprobs"]
    assert [entry["token"] for entry in entries] == ["<", "a", "b", "c"]
    assert entries[0] == {
        "token": "<",
        "logprob": -0.5,
        "bytes": [60],
        "top_logprobs": [{"token": "<", "logprob": -0.5, "bytes": [60]}],
    }
    assert stable(final) == stable(whole(pieces, has_logprobs=True))
    assert check_events(streamed(pieces))["output"][1]["content"][0]["logprobs"] == []


def test_usage_has_every_detail() -> None:
    assert whole([Piece(0, "a", finish="stop")])["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 12,
    }


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (EngineError("it broke"), "server_error", "server_error"),
        (OverloadedError("full"), "rate_limit_exceeded", "rate_limit_exceeded"),
        (RequestError("bad", param="messages[3].content"), "invalid_prompt", "invalid_request_error"),
        (UnavailableError("gone"), "server_error", "server_is_overloaded"),
    ],
)
def test_failures_are_told_twice(error: BraidError, code: str, shown: str) -> None:
    made, ends = answer()
    data = made.opening() + made.chunk(Piece(0, "half an ans")) + made.failure(error)
    events = read(data)
    final = check_events(events)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    param = "input" if error.param else None
    assert {key: events[-2][key] for key in ("code", "message", "param")} == {"code": shown, "message": error.message, "param": param}
    assert final["error"] == {"code": code, "message": error.message}
    assert (final["status"], final["completed_at"], final["output"][0]["status"]) == ("failed", None, "incomplete")
    assert ends == [final]
    check_response(final)


def test_a_background_response_begins_in_the_queue() -> None:
    made, _ = answer(background=True)
    assert made.body()["status"] == "queued"
    data = made.queued() + made.opening() + made.chunk(Piece(0, "a", finish="stop")) + made.closing()
    events = read(data)
    check_events(events)
    assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert [event["response"]["status"] for event in events[:3]] == ["queued", "queued", "in_progress"]


def test_a_cancelled_response_keeps_what_was_said() -> None:
    made, ends = answer()
    data = made.opening() + made.chunk(Piece(0, "half")) + made.cancelled()
    final = check_events(read(data))
    assert (final["status"], final["incomplete_details"], final["error"]) == ("cancelled", None, None)
    assert final["output"][0]["content"][0]["text"] == "half"
    assert final["output"][0]["status"] == "incomplete"
    assert ends == [final]


def test_requests_are_echoed() -> None:
    fields = {
        "instructions": "be brief",
        "temperature": 0.25,
        "top_p": 0.5,
        "max_output_tokens": 40,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "tools": [
            {"type": "function", "name": "f"},
            {"type": "custom", "name": "c", "format": {"type": "grammar", "syntax": "regex", "definition": "a+"}},
        ],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}, "verbosity": "low"},
        "reasoning": {"effort": "low"},
        "user": "me",
        "truncation": "auto",
        "service_tier": "priority",
        "top_logprobs": 3,
        "previous_response_id": "resp_0",
    }
    body = whole([Piece(0, "a", finish="stop")], **fields)
    check_response(body)
    same = {key: value for key, value in fields.items() if key not in ("tools", "service_tier", "reasoning")}
    assert {key: body[key] for key in same} == same
    assert body["tools"][0] == {"type": "function", "name": "f", "parameters": None, "strict": False}
    assert body["tools"][1] == fields["tools"][1]  # type: ignore[index]
    assert body["service_tier"] == "default"
    assert body["reasoning"]["effort"] == "low"
