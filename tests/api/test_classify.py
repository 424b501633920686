"""POST /v1/classify: what the model is asked, how its log-probabilities become shares, and by cosine with an encoder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from service.api.classify import COSINE_SCALE, _normalized, _softmax
from service.api.schema_vectors import DEFAULT_INSTRUCTION
from service.engine.messages import Event, Reading, TokenLogprob, Usage
from service.errors import OverloadedError, RequestError
from tests.api.fakes import CONTEXT, EOS, MODEL, Running, Script
from tests.api.test_embeddings import unit
from tests.api.test_openapi import check as check_form
from tests.api.test_validation import check

URL = "/v1/classify"
LABELS = ["yes", "no", "maybe"]


@pytest.fixture
def chat(server: Running) -> Iterator[Running]:
    """The fake's model with a chat template; the codec writes it as `role:content` lines."""
    server.codec.template = "any"  # type: ignore[assignment]
    yield server
    server.codec.template = None


def softmax(scores: list[float]) -> list[float]:
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def read_sum(prompt: list[int], first: int) -> float:
    """What the fake reads, added up: each id less likely than the one before."""
    return sum(-0.25 * place for place in range(first, len(prompt)))


def prompts(server: Running) -> list[str]:
    return [bytes(token for token in request.prompt if token < 256).decode() for request in server.engine.requests]


def head(labels: list[str] = LABELS) -> str:
    return DEFAULT_INSTRUCTION.replace("{labels}", ", ".join(labels))


def test_what_a_chat_model_is_asked(chat: Running) -> None:
    body = chat.post(URL, input=["first", "second"], labels=LABELS, model=MODEL).json()
    check_form(body, "ClassificationList")
    begin = [f"system:{head()}\nuser:{text}\n" for text in ("first", "second")]
    assert prompts(chat) == [start + label for start in begin for label in LABELS]
    for request in chat.engine.requests:
        assert request.read is not None
        start = begin["second" in bytes(request.prompt[:-1]).decode()]
        # All of the label is read and the end of the answer with it, and nothing of the prompt.
        assert request.read.first == len(start)
        assert request.prompt[-1] == EOS
        assert (request.read.pool, request.read.num_top, request.sampling.max_tokens) == ("", 0, 0)
    for index, (item, start) in enumerate(zip(body["data"], begin, strict=True)):
        scores = [read_sum([0] * (len(start) + len(label) + 1), len(start)) for label in LABELS]
        np.testing.assert_allclose(item["scores"], scores)
        np.testing.assert_allclose(item["probs"], softmax(scores))
        assert (item["index"], item["label"], item["num_classes"]) == (index, "no", 3)
    assert body["labels"] == LABELS
    assert body["usage"]["prompt_tokens"] == sum(len(request.prompt) for request in chat.engine.requests)


def test_what_a_model_without_a_template_is_asked(server: Running) -> None:
    assert server.post(URL, input="text", labels=LABELS).status_code == 200
    start = f"{head()}\n\ntext\n\nLabel:"
    assert prompts(server) == [f"{start} {label}" for label in LABELS]
    assert {request.read.first for request in server.engine.requests if request.read} == {len(start)}
    assert EOS not in server.engine.requests[0].prompt


def test_own_words(chat: Running) -> None:
    text = "braces {labels} {input} {x} \\1"
    answer = chat.post(URL, input=text, labels=["a", "b"], instruction="One of {labels}; not {input}.", template="Q: {input} {labels} {")
    assert answer.status_code == 200, answer.text
    assert prompts(chat)[0] == f"system:One of a, b; not {{input}}.\nuser:Q: {text} {{labels}} {{\na"
    chat.engine.requests.clear()
    chat.post(URL, input="text", labels=["a", "b"], instruction="")
    assert prompts(chat)[0] == "user:text\na"


def test_messages(chat: Running) -> None:
    talk = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "r"},
        {"role": "user", "content": [{"type": "text", "text": "s"}]},
    ]
    chat.post(URL, messages=talk, labels=["a", "b"])
    assert prompts(chat)[0].startswith(f"system:{head(['a', 'b'])}\nuser:q\nassistant:r\nuser:")
    chat.engine.requests.clear()
    own = [{"role": "system", "content": "be brief"}, *talk]
    chat.post(URL, messages=own, labels=["a", "b"])
    assert prompts(chat)[0].startswith("system:be brief\nuser:q\n")
    chat.engine.requests.clear()
    chat.post(URL, messages=own, labels=["a", "b"], instruction="Choose.")
    assert prompts(chat)[0].startswith("system:Choose.\nsystem:be brief\nuser:q\n")
    assert chat.post(URL, messages=talk, labels=["a", "b"]).json()["data"][0]["index"] == 0


def test_messages_need_a_template(server: Running) -> None:
    def refuse(messages: object, **others: object) -> list[int]:
        raise RequestError("no chat template", param="messages")

    server.codec.encode_chat = refuse  # type: ignore[method-assign]
    try:
        error = check(server.post(URL, messages=[{"role": "user", "content": "a"}], labels=["a", "b"]))
    finally:
        del server.codec.encode_chat  # type: ignore[method-assign]
    assert error["param"] == "messages"


def test_normalized_by_length(chat: Running) -> None:
    body = chat.post(URL, input="text", labels=LABELS, normalize="length").json()
    start = len(f"system:{head()}\nuser:text\n")
    scores = [read_sum([0] * (start + len(label) + 1), start) / (len(label) + 1) for label in LABELS]
    np.testing.assert_allclose(body["data"][0]["scores"], scores)


def test_normalized_by_what_is_likely_anyway(chat: Running) -> None:
    body = chat.post(URL, input=["text", "other"], labels=LABELS, normalize="prior").json()
    assert len(chat.engine.requests) == 9
    assert prompts(chat)[6] == f"system:{head()}\nuser:\nyes"
    assert len(body["data"]) == 2
    ends = [len(label) + 1 for label in LABELS]
    with_text, without = (len(f"system:{head()}\nuser:{text}\n") for text in ("text", ""))
    scores = [read_sum([0] * (with_text + end), with_text) - read_sum([0] * (without + end), without) for end in ends]
    np.testing.assert_allclose(body["data"][0]["scores"], scores)


def test_impossible_labels() -> None:
    never = -math.inf
    sums = np.array([[-1.0, never, -2.0], [never, never, never], [-3.0, -4.0, never]])
    logits = _normalized(sums, "prior", np.array([1, 1, 1]))
    np.testing.assert_array_equal(logits, [[2.0, never, -2.0], [never, never, never]])
    shares = _softmax(logits)
    np.testing.assert_allclose(shares[0], [1 / (1 + math.exp(-4)), 0, 1 - 1 / (1 + math.exp(-4))])
    np.testing.assert_allclose(shares[1], [1 / 3] * 3)
    np.testing.assert_array_equal(_normalized(sums, "length", np.array([1, 2, 4]))[0], [-1.0, never, -0.5])


def test_an_impossible_label_is_a_number_in_json(chat: Running) -> None:
    real = chat.engine._event

    def event(request: Any, *others: Any) -> Event:
        reading = Reading([TokenLogprob(-math.inf if ord("n") in request.prompt[-3:] else -1.0, [])])
        usage = Usage(len(request.prompt), 0, 0, 0.0, 0.0, 0.0)
        return Event(request.request_id, 0, [], finish="length", usage=usage, reading=reading)

    chat.engine._event = event  # type: ignore[method-assign]
    try:
        body = chat.post(URL, input="text", labels=["yes", "no"]).json()
    finally:
        chat.engine._event = real  # type: ignore[method-assign]
    check_form(body, "ClassificationList")
    assert body["data"][0]["probs"] == [1.0, 0.0]
    assert body["data"][0]["scores"] == [-1.0, pytest.approx(-3.4e38, rel=0.01)]


@pytest.fixture
def encoder(server: Running) -> Iterator[str]:
    """The only model becomes one that makes vectors."""
    kept = server.engine.infos[MODEL]
    server.engine.infos[MODEL] = msgspec.structs.replace(kept, can_generate=False, pool="mean")
    yield MODEL
    server.engine.infos[MODEL] = kept


@pytest.mark.usefixtures("encoder")
def test_an_encoder_compares_vectors(server: Running) -> None:
    texts = ["abca", "dddd"]
    body = server.post(URL, input=texts, labels=LABELS, template="it: {input}").json()
    check_form(body, "ClassificationList")
    vectors = {text: unit(list(text.encode())) for text in [*(f"it: {text}" for text in texts), *LABELS]}
    for item, text in zip(body["data"], texts, strict=True):
        scores = [float(vectors[f"it: {text}"] @ vectors[label]) for label in LABELS]
        np.testing.assert_allclose(item["scores"], scores, atol=1e-6)
        np.testing.assert_allclose(item["probs"], softmax([score * COSINE_SCALE for score in scores]), atol=1e-5)
        assert item["label"] == LABELS[int(np.argmax(scores))]
    assert len(server.engine.requests) == 5
    assert {request.read.pool for request in server.engine.requests if request.read} == {"mean"}


@pytest.mark.usefixtures("encoder")
@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": "a", "instruction": "x"}, "instruction"),
        ({"input": "a", "normalize": "prior"}, "normalize"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"input": ["b", "a" * (CONTEXT + 1)]}, "input[1]"),
    ],
    ids=["instruction", "normalize", "messages", "length"],
)
def test_what_an_encoder_can_not_do(server: Running, more: dict[str, object], param: str) -> None:
    assert check(server.post(URL, labels=LABELS, **more))["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "a"}, "labels"),
        ({"input": "a", "labels": []}, "labels"),
        ({"input": "a", "labels": ["b"]}, "labels"),
        ({"input": "a", "labels": ["b", "b"]}, "labels"),
        ({"input": "a", "labels": ["b", ""]}, "labels[1]"),
        ({"input": "a", "labels": ["b", 3]}, "labels[1]"),
        ({"input": "a", "labels": "bc"}, "labels"),
        ({"input": "a", "labels": [str(number) for number in range(257)]}, "labels"),
        ({"input": "a", "labels": ["b", "c" * 1025]}, "labels[1]"),
        ({"labels": ["a", "b"]}, "input"),
        ({"input": "", "labels": ["a", "b"]}, "input[0]"),
        ({"input": [], "labels": ["a", "b"]}, "input"),
        ({"input": ["a"] * 129, "labels": ["a", "b"]}, "input"),
        ({"input": ["a"] * 100, "labels": [str(number) for number in range(50)]}, "input"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}], "labels": ["a", "b"]}, "messages"),
        ({"messages": [], "labels": ["a", "b"]}, "messages"),
        ({"messages": [{"role": "nobody", "content": "a"}], "labels": ["a", "b"]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "a"}], "template": "{input}", "labels": ["a", "b"]}, "template"),
        ({"input": "a", "template": "nothing", "labels": ["a", "b"]}, "template"),
        ({"input": "a", "normalize": "sum", "labels": ["a", "b"]}, "normalize"),
        ({"input": "a", "truncate_prompt_tokens": 5, "labels": ["a", "b"]}, "truncate_prompt_tokens"),
        ({"input": "a" * CONTEXT, "labels": ["a", "b"]}, "input"),
        ({"input": ["a", "a" * CONTEXT], "labels": ["a", "b"]}, "input[1]"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_is_refused(server: Running, body: dict[str, object], param: str) -> None:
    error = check(server.post(URL, **body))
    assert error["param"] in (param, param.removesuffix("[0]"))
    assert not server.engine.requests


def test_when_the_engine_fails(server: Running) -> None:
    assert check(server.post(URL, input="a", labels=LABELS, model="nobody"), 404)["code"] == "model_not_found"
    server.engine.script = Script(error_after=0, error_status=500)
    check(server.post(URL, input="a", labels=LABELS), 500)
    server.engine.refusal = OverloadedError("full")
    check(server.post(URL, input="a", labels=LABELS), 429)
