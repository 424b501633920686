"""The Responses routes as OpenAI's own client sees them: whole, streamed, in the background, stored, chained, cancelled, listed.

Long: one test a rule of the contract, for each of the six routes.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from service.api.app import Limits
from service.api.body import BodyLimits
from service.api.responses_store import StoreLimits
from service.errors import OverloadedError
from tests.api.conftest import eventually
from tests.api.fakes import CONTEXT, MODEL, TEXT, Running, Script, running
from tests.api.openai_forms import check_events, check_official, check_response, stable

ROUTE = "/v1/responses"
KEYS = ("first-key-123", "second-key-456")
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}</tool_call>'
KINDS = ["reasoning", "message", "function_call", "function_call", "message"]
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False},
    "strict": True,
}


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def asked(server: Running) -> list[dict[str, Any]]:
    """The messages of the last request, as the template saw them."""
    return [dict(message) for message in server.codec.asked["messages"]]


# --- whole and streamed


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"instructions": "be brief", "temperature": 0.5, "metadata": {"a": "b"}},
        {"max_output_tokens": 5},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"stop": "Stop", "seed": 7, "top_k": 3},
        {"unknown": 1},
    ],
)
@pytest.mark.parametrize("per_event", [1, 2, 5, 20])
def test_streamed_and_whole_are_the_same(server: Running, more: dict[str, Any], per_event: int) -> None:
    server.engine.script = Script(per_event=1)
    whole = server.post(ROUTE, model=MODEL, input="hi", **more)
    assert whole.status_code == 200
    check_response(whole.json())
    server.engine.script = Script(per_event=per_event)
    final = check_events(events_of(server.post(ROUTE, model=MODEL, input="hi", stream=True, **more)))
    assert stable(final) == stable(whole.json())
    first, second = (request.sampling for request in server.engine.requests)
    assert (first.temperature, first.top_k, first.max_tokens) == (second.temperature, second.top_k, second.max_tokens)


def test_the_client_creates(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input="hi", instructions="be brief")
    assert response.output_text == TEXT
    assert response.status == "completed"
    assert response.error is None
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + len(TEXT.encode())


def test_the_client_streams(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=[{"role": "user", "content": "hi"}]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == TEXT
    head = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    tail = ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"]
    assert kinds[:4] == head
    assert kinds[-4:] == tail
    assert set(kinds[4:-4]) == {"response.output_text.delta"}


class Point(pydantic.BaseModel):
    x: int
    label: str


def test_the_client_parses(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = Script('{"x": 3, "label": "Grüße"}')
    parsed = client.responses.parse(model=MODEL, input="a point", text_format=Point)
    assert parsed.output_parsed == Point(x=3, label="Grüße")
    assert server.engine.requests[-1].grammar
    with client.responses.stream(model=MODEL, input="a point", text_format=Point) as stream:
        assert stream.get_final_response().output_parsed == Point(x=3, label="Grüße")
    assert parsed.text is not None
    assert parsed.text.format is not None
    assert parsed.text.format.type == "json_schema"


def test_sampling_reaches_the_engine(server: Running) -> None:
    fields = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "seed": 3, "max_output_tokens": 9, "priority": 2, "timeout": 5}
    body = server.post(ROUTE, input="hi", **fields).json()
    request = server.engine.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.25, 0.5, 7, 0.1)
    assert (sampling.seed, sampling.max_tokens, request.priority, request.timeout_s) == (3, 9, 2, 5)
    assert (body["temperature"], body["top_p"], body["max_output_tokens"], body["model"]) == (0.25, 0.5, 9, MODEL)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert server.post(ROUTE, input="hi").json()["temperature"] == 0.6, "the model's own"


def test_leaving_a_stream_ends_it_and_what_was_said_is_stored(server: Running) -> None:
    server.engine.script = Script(text="word " * 400, waits=0.002)
    body = json.dumps({"input": "hi", "stream": True}).encode()
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(head.encode() + body)
        data = b""
        while b"output_text.delta" not in data:
            data += raw.recv(4096)
    eventually(server.is_idle)
    assert [event.finish for event in server.engine.ended] == ["abort"]
    response_id = data.split(b'"id":"')[1].split(b'"')[0].decode()
    stored: dict[str, Any] = {}

    def is_stored() -> bool:
        answer = httpx.get(f"{server.url}{ROUTE}/{response_id}")
        stored.update(answer.json())
        return answer.status_code == 200

    eventually(is_stored)
    assert stored["status"] == "cancelled"
    assert "word".startswith(stored["output"][0]["content"][0]["text"][:4])
    check_response(stored)


# --- what the model reads


def test_items_become_messages(server: Running) -> None:
    items: list[dict[str, Any]] = [
        {"role": "developer", "content": "rule"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "calling", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Bern"}', "id": "fc_1", "status": None},
        {"type": "custom_tool_call", "call_id": "c2", "name": "shout", "input": "hey"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "HEY"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": ""},
    ]
    answer = server.post(ROUTE, input=items, instructions="be brief")
    assert answer.status_code == 200, answer.text
    assert "warnings" not in answer.json()
    seen = asked(server)
    assert [message["role"] for message in seen] == [
        "system",
        "developer",
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
        "user",
    ]
    assert (seen[0]["content"], seen[1]["content"], seen[4]["content"], seen[5]["content"]) == ("be brief", "rule", "sunny", "HEY")
    assert [part["text"] for part in seen[2]["content"]] == ["a", "b"]
    assert (seen[3]["content"], seen[3]["reasoning_content"]) == ("calling", "hm")
    assert [call["id"] for call in seen[3]["tool_calls"]] == ["c1", "c2"]
    assert seen[3]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Bern"}'}
    assert (seen[4]["tool_call_id"], seen[5]["tool_call_id"]) == ("c1", "c2")
    assert seen[6]["content"][0]["refusal"] == "no"


def test_a_chain_is_one_conversation(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = Script("one")
    first = client.responses.create(model=MODEL, input="a", instructions="not carried over")
    server.engine.script = Script("two")
    second = client.responses.create(model=MODEL, input="b", previous_response_id=first.id)
    client.responses.delete(first.id)
    client.responses.create(model=MODEL, input="c", previous_response_id=second.id)
    assert [(message["role"], message["content"]) for message in asked(server)] == [
        ("user", "a"),
        ("assistant", "one"),
        ("user", "b"),
        ("assistant", "two"),
        ("user", "c"),
    ]
    assert second.previous_response_id == first.id


def test_items_can_be_referred_to(server: Running, client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="a")
    message_id = first.output[0].id
    assert message_id is not None
    client.responses.create(model=MODEL, input=[{"type": "item_reference", "id": message_id}, {"role": "user", "content": "and?"}])
    assert [message["content"] for message in asked(server)] == [TEXT, "and?"]
    client.responses.create(model=MODEL, input=[{"id": message_id}, {"role": "user", "content": "so?"}])  # type: ignore[list-item]
    assert [message["content"] for message in asked(server)] == [TEXT, "so?"]
    error = error_of(server.post(ROUTE, input=[{"type": "item_reference", "id": "msg_none"}]))
    assert (error["param"], error["code"]) == ("input[0].id", "item_not_found")


def test_what_the_client_got_can_be_sent_back(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = Script(f"Let me see. {CALL}")
    first = client.responses.create(model=MODEL, input="weather?", tools=[WEATHER])  # type: ignore[list-item]
    call = first.output[-1]
    assert call.type == "function_call"
    server.engine.script = Script("It is sunny.")
    history: Any = [
        {"role": "user", "content": "weather?"},
        *first.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    second = client.responses.create(model=MODEL, input=history, store=False, tools=[WEATHER])  # type: ignore[list-item]
    assert second.output_text == "It is sunny."
    assert [message["role"] for message in asked(server)] == ["user", "assistant", "tool"]


def test_truncation_drops_the_oldest_turns(server: Running) -> None:
    server.engine.script = Script("ok")
    turns = [{"role": role, "content": f"{number}" * 100} for number in range(8) for role in ("user", "assistant")]
    items = [{"role": "system", "content": "rule"}, *turns, {"role": "user", "content": "last"}]
    long = [{"role": "system", "content": "rule"}, {"role": "user", "content": "x" * CONTEXT}, *turns, {"role": "user", "content": "last"}]
    error = error_of(server.post(ROUTE, input=long))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert f"maximum context length is {CONTEXT} tokens" in error["message"]
    whole = server.post(ROUTE, input=items, max_output_tokens=100, truncation="auto").json()
    assert "warnings" not in whole
    for given in (items, long):
        answer = server.post(ROUTE, input=given, max_output_tokens=900, truncation="auto")
        body = answer.json()
        seen = asked(server)
        assert seen[0]["content"] == "rule"
        assert seen[1]["role"] == "user", "no answer without its question"
        assert seen[-1]["content"] == "last"
        num_dropped = len(given) - len(seen)
        assert num_dropped > 0
        assert body["warnings"] == [f"truncation: the oldest {num_dropped} items were left out"]
        assert answer.headers["x-braid-warnings"] == body["warnings"][0]
        # As few as will do: with the turn before, it would have been too long.
        dropped = given[num_dropped : num_dropped + 1] if given is items else []
        assert body["usage"]["input_tokens"] + 900 <= CONTEXT
        assert body["usage"]["input_tokens"] + 900 + 2 * 112 > CONTEXT or not dropped
    error = error_of(server.post(ROUTE, input="x" * CONTEXT, truncation="auto"))
    assert error["code"] == "context_length_exceeded"


# --- tools


@pytest.mark.parametrize("per_event", [1, 2, 5, 20])
def test_calls_are_the_same_streamed_and_whole(server: Running, client: openai.OpenAI, per_event: int) -> None:
    text = f"<think>Where?</think>Let me see. {CALL}\n{CALL.replace('Bern', 'Zürich')} Done."
    server.engine.script = Script(text)
    whole = server.post(ROUTE, input="weather?", tools=[WEATHER]).json()
    check_response(whole)
    assert [item["type"] for item in whole["output"]] == KINDS
    assert [json.loads(item["arguments"]) for item in whole["output"][2:4]] == [{"city": "Bern"}, {"city": "Zürich"}]
    assert len({item["call_id"] for item in whole["output"][2:4]}) == 2
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    server.engine.script = Script(text, per_event=per_event)
    final = check_events(events_of(server.post(ROUTE, input="weather?", tools=[WEATHER], stream=True)))
    assert stable(final) == stable(whole)
    with client.responses.stream(model=MODEL, input="weather?", tools=[WEATHER]) as stream:  # type: ignore[list-item]
        parsed = stream.get_final_response()
    assert [item.type for item in parsed.output] == KINDS


def test_a_loop_of_tools(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = Script(CALL)
    first = client.responses.create(model=MODEL, input="weather?", tools=[WEATHER], tool_choice="required")  # type: ignore[list-item]
    (call,) = first.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments), first.status) == ("get_weather", {"city": "Bern"}, "completed")
    assert server.engine.requests[-1].grammar
    server.engine.script = Script("It is sunny.")
    second = client.responses.create(
        model=MODEL,
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}],
        tools=[WEATHER],  # type: ignore[list-item]
    )
    assert second.output_text == "It is sunny."
    seen = asked(server)
    assert [message["role"] for message in seen] == ["user", "assistant", "tool"]
    assert seen[1]["tool_calls"][0]["id"] == seen[2]["tool_call_id"] == call.call_id


def test_custom_tools(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = Script('<tool_call>{"name": "shout", "input": "hey you"}</tool_call>')
    tool: Any = {"type": "custom", "name": "shout", "format": {"type": "grammar", "syntax": "regex", "definition": "[a-z ]+"}}
    whole = server.post(ROUTE, input="shout", tools=[tool], tool_choice={"type": "custom", "name": "shout"}).json()
    check_response(whole)
    assert [(item["type"], item["name"], item["input"]) for item in whole["output"]] == [("custom_tool_call", "shout", "hey you")]
    with client.responses.stream(model=MODEL, input="shout", tools=[tool]) as stream:
        kinds = [event.type for event in stream]
    assert "response.custom_tool_call_input.delta" in kinds
    assert "response.custom_tool_call_input.done" in kinds
    call_id = whole["output"][0]["call_id"]
    answer = server.post(
        ROUTE,
        previous_response_id=whole["id"],
        input=[{"type": "custom_tool_call_output", "call_id": call_id, "output": "HEY"}],
        tools=[tool],
    )
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("text", "most"), [(CALL, 60), (CALL[:-20], None)])
def test_a_call_that_is_cut_is_incomplete(server: Running, text: str, most: int | None) -> None:
    server.engine.script = Script(text)
    for stream in (False, True):
        answer = server.post(ROUTE, input="weather?", tools=[WEATHER], max_output_tokens=most, stream=stream)
        body = check_events(events_of(answer)) if stream else answer.json()
        (call,) = body["output"]
        assert (body["status"], call["status"]) == ("incomplete", "incomplete")
        assert body["incomplete_details"] == {"reason": "max_output_tokens"}
        assert call["arguments"].startswith("{")


# --- stored responses


def test_retrieve_and_delete(server: Running, client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="hi")
    assert client.responses.retrieve(made.id) == made
    answer = httpx.delete(f"{server.url}{ROUTE}/{made.id}")
    assert answer.json() == {"id": made.id, "object": "response", "deleted": True}
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError) as caught:
            call(made.id)
        assert caught.value.param == "response_id"
        assert made.id in caught.value.message
    kept = client.responses.create(model=MODEL, input="hi")
    client.responses.delete(kept.id)


def test_streams_are_stored_before_their_last_event(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="hi") as stream:
        for event in stream:
            if event.type == "response.completed":
                assert client.responses.retrieve(event.response.id).output_text == TEXT


def test_store_false_keeps_nothing(server: Running, client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="hi", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="hi", previous_response_id=made.id)
    assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")
    error = error_of(server.post(ROUTE, input="hi", store=False, background=True))
    assert error["param"] == "background"


def test_input_items(server: Running, client: openai.OpenAI) -> None:
    first = client.responses.create(model=MODEL, input=[{"role": "user", "content": str(number)} for number in range(5)])
    second = client.responses.create(model=MODEL, input="last", previous_response_id=first.id)
    texts = [item.content[0].text for item in client.responses.input_items.list(second.id, order="asc", limit=2)]  # type: ignore[union-attr]
    assert texts == ["0", "1", "2", "3", "4", TEXT, "last"]
    newest = client.responses.input_items.list(second.id, limit=1)
    assert newest.data[0].content[0].text == "last"  # type: ignore[union-attr]
    assert (newest.first_id, newest.last_id, newest.has_more) == (newest.data[0].id, newest.data[0].id, True)
    page = httpx.get(f"{server.url}{ROUTE}/{second.id}/input_items").json()
    check_official(page, "ResponseItemList")
    assert len(page["data"]) == 7
    assert not page["has_more"]
    for query, param in [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=no", "after")]:
        assert error_of(httpx.get(f"{server.url}{ROUTE}/{second.id}/input_items?{query}"))["param"] == param


def test_every_kind_of_item_is_listed_in_its_official_form(server: Running) -> None:
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "s"}]},
        {"role": "assistant", "content": "b", "status": "completed", "id": "msg_1"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "sunny"}]},
        {"type": "custom_tool_call", "call_id": "c2", "name": "g", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "y"},
    ]
    made = server.post(ROUTE, input=items).json()
    page = httpx.get(f"{server.url}{ROUTE}/{made['id']}/input_items?order=asc").json()
    check_official(page, "ResponseItemList")
    assert [item["type"] for item in page["data"]] == [item.get("type", "message") for item in items]
    assert page["data"][2]["id"] == "msg_1"
    assert page["data"][3]["id"].startswith("fc_")
    # The same id for something else gets another one; the first stays what it was.
    server.post(ROUTE, input=[{"role": "assistant", "content": "other", "id": "msg_1"}, {"role": "user", "content": "?"}])
    server.post(ROUTE, input=[{"id": "msg_1"}, {"role": "user", "content": "?"}])
    assert asked(server)[0]["content"] == "b"


def test_input_tokens(server: Running, client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="hi", instructions="be brief", tools=[WEATHER])  # type: ignore[list-item]
    counted = client.responses.input_tokens.count(model=MODEL, input="hi", instructions="be brief", tools=[WEATHER])
    assert made.usage is not None
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", made.usage.input_tokens)
    answer = server.post(f"{ROUTE}/input_tokens", previous_response_id=made.id)
    check_official(answer.json(), "TokenCountsResource")
    assert answer.json()["input_tokens"] > counted.input_tokens - len("system:be brief\n")
    assert len(server.engine.requests) == 1, "counting runs nothing"
    assert error_of(server.post(f"{ROUTE}/input_tokens"))["param"] == "input"


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    limits = Limits(responses=StoreLimits(max_responses=2, max_bytes=60_000))
    with running(api_keys=KEYS, limits=limits) as server:
        yield server


def keyed(server: Running, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def test_a_response_belongs_to_its_key(small: Running) -> None:
    small.engine.script = Script(waits=0.001)
    with keyed(small, KEYS[0]) as mine, keyed(small, KEYS[1]) as theirs:
        made = mine.responses.create(model=MODEL, input="hi")
        running_id = mine.responses.create(model=MODEL, input="hi", background=True).id
        for each in (made.id, running_id):
            for call in (theirs.responses.retrieve, theirs.responses.delete, theirs.responses.cancel, theirs.responses.input_items.list):
                with pytest.raises(openai.NotFoundError):
                    call(each)
            with pytest.raises(openai.BadRequestError):
                theirs.responses.create(model=MODEL, input="hi", previous_response_id=each)
        with pytest.raises(openai.BadRequestError):
            theirs.responses.create(model=MODEL, input=[{"type": "item_reference", "id": made.output[0].id}])  # type: ignore[typeddict-item]
        assert mine.responses.retrieve(made.id).output_text == TEXT
        eventually(lambda: mine.responses.retrieve(running_id).status == "completed")
        mine.responses.delete(made.id)
        mine.responses.delete(running_id)


def test_the_store_is_bounded(small: Running) -> None:
    small.engine.script = Script()
    with keyed(small, KEYS[0]) as client:
        ids = [client.responses.create(model=MODEL, input="x" * 500).id for _ in range(4)]
        found = []
        for each in ids:
            with contextlib.suppress(openai.NotFoundError):
                found.append(client.responses.retrieve(each).id)
        assert found == ids[-2:]
        with pytest.raises(openai.BadRequestError):
            client.responses.create(model=MODEL, input="y", previous_response_id=ids[0])


def test_logs_in_the_background_are_bounded(small: Running) -> None:
    small.engine.script = Script(text="x" * 1500, waits=0.001)
    with keyed(small, KEYS[0]) as client:

        def begin() -> str:
            stream = client.responses.create(model=MODEL, input="hi", background=True, stream=True)
            with stream:
                return next(iter(stream)).response.id  # type: ignore[union-attr]

        ids: list[str] = []

        def begin_many() -> None:
            for _ in range(200):
                ids.append(begin())

        with pytest.raises(openai.RateLimitError):
            begin_many()
        # Its log was larger than the whole store; the response itself is not.
        eventually(lambda: client.responses.retrieve(ids[-1]).status == "completed", 20)
        assert client.responses.retrieve(ids[-1]).output_text == "x" * 1500
        eventually(small.is_idle, 20)


# --- background


def test_background_runs_without_its_client(server: Running, client: openai.OpenAI) -> None:
    hold = threading.Event()
    server.engine.script = Script(hold=hold)
    made = client.responses.create(model=MODEL, input="hi", background=True)
    assert (made.status, made.background, made.output) == ("queued", True, [])
    assert client.responses.retrieve(made.id).status == "queued"
    hold.set()
    eventually(lambda: client.responses.retrieve(made.id).status == "completed")
    final = client.responses.retrieve(made.id)
    assert final.output_text == TEXT
    assert client.responses.cancel(made.id) == final, "too late to cancel"
    assert client.responses.create(model=MODEL, input="and?", previous_response_id=made.id).status == "completed"
    check_response(httpx.get(f"{server.url}{ROUTE}/{made.id}").json())


def test_background_is_cancelled(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = Script(text="word " * 300, waits=0.003)
    made = client.responses.create(model=MODEL, input="hi", background=True)
    eventually(lambda: bool(client.responses.retrieve(made.id).output))
    assert client.responses.retrieve(made.id).status == "in_progress"
    cancelled = client.responses.cancel(made.id)
    assert cancelled.status == "cancelled"
    assert "word word".startswith(cancelled.output_text[:9])
    eventually(server.is_idle)
    assert [event.finish for event in server.engine.ended] == ["abort"]
    again = client.responses.cancel(made.id)
    assert again.status == "cancelled"
    assert client.responses.retrieve(made.id).output_text == cancelled.output_text
    whole = client.responses.create(model=MODEL, input="hi", max_output_tokens=3)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(whole.id)


def test_a_deleted_background_response_is_gone(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = Script(text="word " * 300, waits=0.003)
    made = client.responses.create(model=MODEL, input="hi", background=True)
    client.responses.delete(made.id)
    eventually(server.is_idle)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_a_background_stream_can_be_read_again(server: Running) -> None:
    server.engine.script = Script(waits=0.002)
    body = {"input": "hi", "background": True, "stream": True}
    seen = b""
    with httpx.stream("POST", f"{server.url}{ROUTE}", json=body) as answer:
        for chunk in answer.iter_raw():
            seen += chunk
            if b"output_text.delta" in seen:
                break
    response_id = seen.split(b'"id":"')[1].split(b'"')[0].decode()
    url = f"{server.url}{ROUTE}/{response_id}"
    whole = events_of(httpx.get(f"{url}?stream=true"))
    assert server.engine.ended[0].finish == "stop", "leaving did not end it"
    final = check_events(whole)
    assert final["output"][0]["content"][0]["text"] == TEXT
    assert [event["type"] for event in whole[:3]] == ["response.created", "response.queued", "response.in_progress"]
    for after in (0, 5, len(whole) - 2):
        rest = events_of(httpx.get(f"{url}?stream=true&starting_after={after}"))
        assert rest == whole[after + 1 :]
        check_events(rest, first=after + 1)
    assert httpx.get(f"{url}?stream=true&starting_after={len(whole)}").content == b""
    assert httpx.get(url).json() == {**final, "usage": httpx.get(url).json()["usage"]}
    for query, param in [("stream=maybe", "stream"), ("stream=true&starting_after=-1", "starting_after")]:
        assert error_of(httpx.get(f"{url}?{query}"))["param"] == param


def test_a_reader_follows_what_still_runs(server: Running, client: openai.OpenAI) -> None:
    hold = threading.Event()
    server.engine.script = Script(hold=hold)
    numbers: list[int] = []

    def read() -> None:
        with client.responses.stream(response_id=made.id, starting_after=1) as stream:
            numbers.extend(event.sequence_number for event in stream)

    with client.responses.create(model=MODEL, input="hi", background=True, stream=True) as first:
        made = next(iter(first)).response  # type: ignore[union-attr]
    reader = threading.Thread(target=read)
    reader.start()
    hold.set()
    reader.join(10)
    assert numbers[:2] == [2, 3]
    assert numbers == list(range(2, 2 + len(numbers)))


def test_what_has_no_log_is_not_streamed_again(server: Running, client: openai.OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input="hi")
    plain = client.responses.create(model=MODEL, input="hi", background=True)
    for each in (whole, plain):
        assert error_of(httpx.get(f"{server.url}{ROUTE}/{each.id}?stream=true"))["param"] == "stream"
    eventually(lambda: client.responses.retrieve(plain.id).status == "completed")


def test_a_cancelled_stream_ends_for_its_readers(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = Script(text="word " * 300, waits=0.003)
    events: list[dict[str, Any]] = []
    body = {"input": "hi", "background": True, "stream": True}
    with httpx.stream("POST", f"{server.url}{ROUTE}", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line[6:]))
                if len(events) == 8:
                    assert client.responses.cancel(events[0]["response"]["id"]).status == "cancelled"
    final = check_events(events)
    assert (events[-1]["type"], final["status"]) == ("response.incomplete", "cancelled")


# --- faults


def test_a_fault_in_a_stream_is_told_and_stored(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = Script(error_after=4)
    events = events_of(server.post(ROUTE, input="hi", stream=True))
    final = check_events(events)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert (final["status"], final["error"]["code"]) == ("failed", "server_error")
    assert client.responses.retrieve(final["id"]).status == "failed"
    with client.responses.stream(model=MODEL, input="hi") as stream:
        assert [event.type for event in stream][-1] == "response.failed"


def test_a_fault_in_the_background_is_stored(server: Running, client: openai.OpenAI) -> None:
    server.engine.script = Script(error_after=0)
    made = client.responses.create(model=MODEL, input="hi", background=True)
    eventually(lambda: client.responses.retrieve(made.id).status == "failed")
    failed = client.responses.retrieve(made.id)
    assert failed.error is not None
    assert failed.error.code == "server_error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 408, 500, 503])
def test_a_fault_before_the_first_byte_is_a_status(server: Running, stream: bool, status: int) -> None:
    server.engine.script = Script(error_after=0, error_status=status)
    error_of(server.post(ROUTE, input="hi", stream=stream), status)


def test_a_full_server_says_so(server: Running) -> None:
    server.engine.refusal = OverloadedError("full", retry_after_s=3)
    for more in ({}, {"stream": True}, {"background": True}):
        answer = server.post(ROUTE, input="hi", **more)
        assert error_of(answer, 429)["type"] == "rate_limit_error"
        assert answer.headers["retry-after"] == "3"


# --- bad requests

BAD: list[tuple[dict[str, Any], str | None]] = [
    ({}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": [3]}, "input[0]"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "king", "content": "a"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0]"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id"),
    ({"input": "a", "previous_response_id": "resp_none"}, "previous_response_id"),
    ({"input": "a", "conversation": "conv_1"}, "conversation"),
    ({"input": "a", "prompt": {"id": "p"}}, "prompt"),
    ({"input": "a", "temperature": 3}, "temperature"),
    ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
    ({"input": "a", "max_output_tokens": CONTEXT}, "max_output_tokens"),
    ({"input": "a", "min_tokens": 3, "max_output_tokens": 2}, "min_tokens"),
    ({"input": "a", "top_logprobs": 21}, "top_logprobs"),
    ({"input": "a", "include": ["everything"]}, "include[0]"),
    ({"input": "a", "stream_options": {}}, "stream_options"),
    ({"input": "a", "metadata": {"a": 1}}, "metadata.a"),
    ({"input": "a", "logit_bias": {"1": 1}, "truncation": "some"}, "truncation"),
    ({"input": "a", "reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"input": "a", "text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"input": "a", "text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
    ({"input": "a", "text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    ({"input": "a", "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "thing"}}}}, "text.format.schema"),
    ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"input": "a", "tools": [{"type": "image_generation"}]}, "tools[0]"),
    ({"input": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
    ({"input": "a", "tools": [{"type": "function", "name": "not a name"}]}, "tools[0].name"),
    ({"input": "a", "tools": [{"type": "function", "name": "f"}] * 2}, "tools[1].name"),
    ({"input": "a", "tools": [{"type": "custom", "name": "f", "format": {"type": "grammar"}}]}, "tools[0].format.syntax"),
    ({"input": "a", "tool_choice": "required"}, "tool_choice"),
    ({"input": "a", "tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice.name"),
    ({"input": "a", "tools": [WEATHER], "tool_choice": {"type": "custom", "name": "get_weather"}}, "tool_choice.name"),
    ({"input": "a", "tools": [WEATHER], "tool_choice": {"type": "image_generation"}}, "tool_choice"),
    (
        {
            "input": "a",
            "tools": [WEATHER],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other"}]},
        },
        "tool_choice.tools[0].name",
    ),
    ({"input": "refuse me"}, "input"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=lambda value: json.dumps(value)[:60])
def test_bad_requests_name_the_field(server: Running, body: dict[str, Any], param: str | None) -> None:
    error = error_of(server.post(ROUTE, **body))
    assert error["type"] == "invalid_request_error"
    assert error["param"] is not None
    # Inside of a schema, the grammar says where.
    assert error["param"] == param or (param == "text.format.schema" and error["param"].startswith(param))
    assert not server.engine.requests


def test_tools_that_are_not_built_are_named(server: Running) -> None:
    for kind in ("web_search", "file_search", "code_interpreter", "mcp", "computer", "shell", "apply_patch"):
        assert kind in error_of(server.post(ROUTE, input="a", tools=[{"type": kind}]))["message"]
    error = error_of(server.post(ROUTE, input="a", tools=[{"type": "image_generation"}]))
    assert "generations draws" in error["message"]


def test_nothing_is_ignored_silently(server: Running) -> None:
    body = server.post(
        ROUTE,
        input=[{"role": "user", "content": "a", "colour": 1}, {"type": "reasoning", "summary": [], "encrypted_content": "x"}],
        tools=[{**WEATHER, "colour": 1}],
        text={"colour": 1},
        reasoning={"summary": "auto"},
        include=["reasoning.encrypted_content"],
        colour=1,
    ).json()
    told = " ".join(body["warnings"])
    for name in ("'colour'", "input[0].colour", "tools[0].colour", "text.colour", "reasoning.summary", "input[1].encrypted_content"):
        assert name in told
    assert "reasoning.encrypted_content" in told
    check_response(body)


def test_what_has_no_effect_is_told_in_the_words_of_this_api(server: Running) -> None:
    body = server.post(ROUTE, input="a", reasoning={"effort": "high"}, text={"verbosity": "low"}).json()
    assert body["warnings"] == [f"{name} has no effect on this model" for name in ("text.verbosity", "reasoning.effort")]


def test_strict_refuses_what_would_be_ignored() -> None:
    with running(limits=Limits(body=BodyLimits(is_strict=True))) as strict:
        for more, param in [
            ({"colour": 1}, "colour"),
            ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
            ({"text": {"verbosity": "low"}}, "text.verbosity"),
            ({"tools": [{**WEATHER, "colour": 1}]}, "tools[0].colour"),
        ]:
            assert error_of(strict.post(ROUTE, input="a", **more))["param"] == param
        assert strict.post(ROUTE, input="a").status_code == 200


def test_nulls_are_absent(server: Running) -> None:
    names = ("instructions", "previous_response_id", "tools", "tool_choice", "text", "reasoning", "max_output_tokens", "metadata", "store")
    more: dict[str, Any] = dict.fromkeys((*names, "stream", "background", "truncation", "include", "prompt", "conversation", "user"))
    answer = server.post(ROUTE, input="a", **more)
    assert answer.status_code == 200, answer.text
    assert answer.json()["store"] is True
    assert "warnings" not in answer.json()
