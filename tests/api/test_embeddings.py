"""POST /v1/embeddings: every form of input, both encodings, pooling, cutting, limits, and what the engine was asked for."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import openai
import pytest

from service.api.app import Limits
from service.api.body import BodyLimits
from service.codec.tokenizer import Ends
from service.engine.messages import ModelInfo
from service.errors import OverloadedError
from tests.api.conftest import eventually
from tests.api.fakes import CONTEXT, MODEL, VOCAB, Running, Script, running, vector_of
from tests.api.test_openapi import check as check_form
from tests.api.test_validation import check

URL = "/v1/embeddings"


def unit(ids: list[int], dimensions: int = 4) -> np.ndarray[Any, Any]:
    """What the fake's vector of these ids becomes."""
    vector = np.array(vector_of(ids)[:dimensions], dtype=np.float64)
    return vector / max(float(np.linalg.norm(vector)), 1e-300)


def vectors(answer: httpx.Response) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [each["index"] for each in data] == list(range(len(data)))
    return np.array([each["embedding"] for each in data])


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("Grüße", [list("Grüße".encode())]),
        (["one", "three", "one"], [list(b"one"), list(b"three"), list(b"one")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        (["<|end|>"], [list(b"<|end|>")]),
    ],
    ids=["text", "texts", "ids", "id_lists", "special"],
)
def test_every_form_of_input(server: Running, given: object, prompts: list[list[int]]) -> None:
    answer = server.post(URL, input=given, model=MODEL)
    np.testing.assert_allclose(vectors(answer), [unit(prompt) for prompt in prompts], atol=1e-7)
    assert sorted(request.prompt for request in server.engine.requests) == sorted(prompts)
    for request in server.engine.requests:
        assert request.read is not None
        assert (request.read.pool, request.read.first, request.sampling.max_tokens) == ("last", 0, 0)
    body = answer.json()
    check_form(body, "EmbeddingList")
    total = sum(map(len, prompts))
    assert body["usage"] == {"prompt_tokens": total, "total_tokens": total, "prompt_tokens_details": {"cached_tokens": 0}}
    assert body["model"] == MODEL


def test_the_official_client_decodes_the_same_from_base64_and_numbers(client: openai.OpenAI, server: Running) -> None:
    texts = ["a", "bb", "ccc"]
    usual = client.embeddings.create(model=MODEL, input=texts)
    assert server.engine.requests
    floats = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    np.testing.assert_array_equal([each.embedding for each in usual.data], [each.embedding for each in floats.data])
    raw = server.post(URL, input=texts, encoding_format="base64")
    check_form({**raw.json(), "data": []} | {"data": [{"object": "embedding", "index": 0, "embedding": [1.0]}]}, "EmbeddingList")
    first = np.frombuffer(base64.b64decode(raw.json()["data"][1]["embedding"]), dtype="<f4")
    np.testing.assert_allclose(first, unit([98, 98]), atol=1e-7)


def test_dimensions_are_cut_and_brought_to_length_one(server: Running) -> None:
    found = vectors(server.post(URL, input="abcd and more", dimensions=2))
    np.testing.assert_allclose(found, [unit(list(b"abcd and more"), 2)], atol=1e-7)
    assert check(server.post(URL, input="a", dimensions=5))["param"] == "dimensions"
    assert not [request for request in server.engine.requests if len(request.prompt) == 1]


def test_a_vector_of_zeros_stays(server: Running) -> None:
    # The fake's first number counts ids that four divides, of which there are none.
    np.testing.assert_array_equal(vectors(server.post(URL, input=[1, 2], dimensions=1)), [[0.0]])


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_pooling_is_passed_on(server: Running, pooling: str) -> None:
    vectors(server.post(URL, input="a", pooling=pooling))
    read = server.engine.requests[0].read
    assert read is not None
    assert read.pool == pooling


def test_other_fields_reach_the_engine(server: Running) -> None:
    server.post(URL, input=["a", "b"], priority=7, timeout=3.5, cache_salt="x", user="me")
    server.post(URL, input="a")
    salted, plain = server.engine.requests[:2], server.engine.requests[2]
    assert {(request.priority, request.timeout_s) for request in salted} == {(7, 3.5)}
    assert salted[0].tenant == salted[1].tenant != plain.tenant


def test_order_is_kept_over_many_inputs(server: Running) -> None:
    texts = [chr(97 + number % 26) * (1 + number % 7) for number in range(500)]
    found = vectors(server.post(URL, input=texts))
    np.testing.assert_allclose(found, [unit(list(text.encode())) for text in texts], atol=1e-7)


WRONG: list[tuple[dict[str, object], str, str | None]] = [
    ({}, "input", "missing_required_parameter"),
    ({"input": None}, "input", "missing_required_parameter"),
    ({"input": ""}, "input", "invalid_value"),
    ({"input": []}, "input", "invalid_type"),
    ({"input": {}}, "input", "invalid_type"),
    ({"input": 3}, "input", "invalid_type"),
    ({"input": [""]}, "input[0]", "invalid_value"),
    ({"input": ["a", 1]}, "input[1]", "invalid_type"),
    ({"input": [1, "a"]}, "input[1]", "invalid_type"),
    ({"input": [1.5]}, "input[0]", "invalid_type"),
    ({"input": [True]}, "input[0]", "invalid_type"),
    ({"input": [[]]}, "input[0]", "invalid_value"),
    ({"input": [[1], [-1]]}, "input[1][0]", "invalid_value"),
    ({"input": [[1], [VOCAB]]}, "input[1]", None),
    ({"input": [VOCAB]}, "input", None),
    ({"input": ["a"] * 2049}, "input", "invalid_value"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
    ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
    ({"input": "a", "dimensions": 1.5}, "dimensions", "invalid_type"),
    ({"input": "a", "pooling": "max"}, "pooling", "invalid_value"),
    ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", None),
    ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "invalid_value"),
    ({"input": "a", "truncate_prompt_tokens": CONTEXT + 1}, "truncate_prompt_tokens", None),
    ({"input": "a" * (CONTEXT + 1)}, "input", "context_length_exceeded"),
    ({"input": ["a", "a" * (CONTEXT + 1)]}, "input[1]", "context_length_exceeded"),
]


@pytest.mark.parametrize(("body", "param", "code"), WRONG, ids=lambda value: json.dumps(value)[:60])
def test_what_is_refused(server: Running, body: dict[str, object], param: str, code: str | None) -> None:
    error = check(server.post(URL, **body))
    assert (error["param"], error["code"]) == (param, code)
    assert not server.engine.requests


def test_an_unknown_model_and_an_unknown_field(server: Running) -> None:
    assert check(server.post(URL, input="a", model="text-embedding-3-small"), 404)["code"] == "model_not_found"
    answer = server.post(URL, input="a", task="search")
    assert answer.json()["warnings"] == ["unknown field 'task' was ignored"]
    assert answer.headers["x-braid-warnings"] == "unknown field 'task' was ignored"
    check_form(answer.json(), "EmbeddingList")


def test_cut_texts_are_named(server: Running) -> None:
    answer = server.post(URL, input=["abc", "abcdef"], truncate_prompt_tokens=4)
    np.testing.assert_allclose(vectors(answer), [unit(list(b"abc")), unit(list(b"abcd"))], atol=1e-7)
    assert answer.json()["warnings"] == ["input[1] was cut from 6 to 4 tokens"]
    whole = server.post(URL, input="a" * (CONTEXT + 5), truncate_prompt_tokens=-1)
    assert whole.json()["usage"]["prompt_tokens"] == CONTEXT
    assert "input was cut from 2053 to 2048 tokens" in whole.headers["x-braid-warnings"]


def test_the_id_that_closes_a_text_stays(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.codec.tokenizer, "ends", Ends(closing_id=ord("f")), raising=False)
    vectors(server.post(URL, input="abcdef", truncate_prompt_tokens=3))
    assert server.engine.requests[0].prompt == list(b"abf")


def test_strict_servers_refuse_what_would_be_cut() -> None:
    with running(limits=Limits(body=BodyLimits(is_strict=True))) as server:
        assert check(server.post(URL, input="abcdef", truncate_prompt_tokens=3))["param"] == "input"
        assert check(server.post(URL, input="a", task="search"))["param"] == "task"
        assert server.post(URL, input="abc", truncate_prompt_tokens=3).status_code == 200


@pytest.fixture
def encoder(server: Running) -> Iterator[str]:
    """A second model, which makes vectors alone."""
    info = msgspec.structs.replace(server.engine.infos[MODEL], name="reader", can_generate=False, pool="mean", max_context=32)
    backend = next(cell.cell_contents for cell in backend_cells(server) if hasattr(cell.cell_contents, "codecs"))
    backend.codecs["reader"] = server.codec
    server.engine.infos["reader"] = info
    yield "reader"
    del backend.codecs["reader"], server.engine.infos["reader"]


def backend_cells(server: Running) -> list[Any]:
    """What the route of embeddings was made with."""
    for route in server.app.routes:
        inner = getattr(route, "original_router", None)
        for each in inner.routes if inner is not None else [route]:
            if each.path == URL:
                return list(each.endpoint.__closure__)
    raise AssertionError("there is no such route")


@pytest.mark.usefixtures("encoder")
def test_an_encoder_is_preferred_and_pools_its_own_way(server: Running) -> None:
    server.post(URL, input="a")
    server.post(URL, input="a", model=MODEL)
    asked = [(request.model, request.read.pool) for request in server.engine.requests if request.read]
    assert asked == [("reader", "mean"), (MODEL, "last")]
    assert check(server.post(URL, input="a" * 33))["code"] == "context_length_exceeded"


@pytest.mark.usefixtures("encoder")
def test_an_encoder_makes_no_text(server: Running) -> None:
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})):
        assert check(server.post(path, model="reader", **body))["param"] == "model"
    assert isinstance(server.engine.infos["reader"], ModelInfo)


def test_when_the_engine_fails(server: Running) -> None:
    for status in (400, 408, 500, 503):
        server.engine.script = Script(error_after=0, error_status=status)
        check(server.post(URL, input=["a", "b", "c"]), status)
    server.engine.script = Script()
    server.engine.refusal = OverloadedError("full", retry_after_s=2)
    answer = server.post(URL, input=["a", "b"])
    check(answer, 429)
    assert answer.headers["retry-after"] == "2"
    server.engine.refusal = None
    server.engine.state = "loading"
    check(server.post(URL, input="a"), 503)


def test_a_client_that_leaves_ends_the_work(server: Running) -> None:
    server.engine.script = Script(hold=threading.Event())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}{URL}", json={"input": ["a"] * 200}, timeout=0.3)
    eventually(server.is_idle)
    num_asked = len(server.engine.requests)
    assert 0 < num_asked < 200
    assert len(server.engine.aborts) == num_asked
    time.sleep(0.1)
    assert len(server.engine.requests) == num_asked


def test_a_large_answer_is_quick(server: Running) -> None:
    """2,048 inputs through one request; the bound is far above what it takes, and far below a wait for anything."""
    start = time.monotonic()
    assert len(vectors(server.post(URL, input=["abc"] * 2048))) == 2048
    assert time.monotonic() - start < 20
