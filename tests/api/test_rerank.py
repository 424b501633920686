"""Rerank in three dialects and score in four: order, ties, what comes back, and every pair of fields that does not fit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from service.errors import OverloadedError
from tests.api.fakes import CONTEXT, MODEL, Running, Script
from tests.api.test_embeddings import unit
from tests.api.test_openapi import check as check_form
from tests.api.test_validation import check

QUERY = "abca"
DOCUMENTS = ["dddd", "abcd", "zzz", "acba", "aaab"]
RERANK = ("/v1/rerank", "/rerank", "/v2/rerank")
SCORE = ("/v1/score", "/score")


def cosine(left: str, right: str) -> float:
    return float(unit(list(left.encode())) @ unit(list(right.encode())))


def ranked(query: str, documents: list[str]) -> list[tuple[int, float]]:
    scores = [cosine(query, document) for document in documents]
    return sorted(enumerate(scores), key=lambda pair: (-round(pair[1], 9), pair[0]))


def results(body: dict[str, Any]) -> list[tuple[int, float]]:
    return [(each["index"], each["relevance_score"]) for each in body["results"]]


@pytest.mark.parametrize("path", RERANK)
def test_the_nearest_come_first(server: Running, path: str) -> None:
    body = server.post(path, query=QUERY, documents=DOCUMENTS, model=MODEL).json()
    expected = ranked(QUERY, DOCUMENTS)
    assert [index for index, _ in results(body)] == [index for index, _ in expected]
    np.testing.assert_allclose([score for _, score in results(body)], [score for _, score in expected], atol=1e-6)
    assert results(body)[0] == (3, pytest.approx(1.0))
    total = len(QUERY) + sum(map(len, DOCUMENTS))
    if path == "/v2/rerank":
        check_form(body, "RankingV2")
        assert body["meta"]["tokens"] == {"input_tokens": total, "output_tokens": 0}
        assert "document" not in body["results"][0]
        assert "model" not in body
    else:
        check_form(body, "Ranking")
        assert body["usage"]["total_tokens"] == total
        assert body["results"][0]["document"] == {"text": "acba"}
    prompts = [bytes(request.prompt).decode() for request in server.engine.requests]
    assert sorted(prompts) == sorted([QUERY, *DOCUMENTS])


@pytest.mark.parametrize("path", RERANK)
@pytest.mark.parametrize("wanted", [True, False])
def test_documents_come_back_where_they_are_wanted(server: Running, path: str, wanted: bool) -> None:
    body = server.post(path, query="a", documents=["a", {"text": "b"}], return_documents=wanted).json()
    assert [each.get("document") for each in body["results"]] == ([{"text": "a"}, {"text": "b"}] if wanted else [None, None])


def test_top_n(server: Running) -> None:
    for top_n, count in ((1, 1), (4, 4), (5, 5), (99, 5)):
        body = server.post("/v1/rerank", query=QUERY, documents=DOCUMENTS, top_n=top_n).json()
        assert [index for index, _ in results(body)] == [index for index, _ in ranked(QUERY, DOCUMENTS)][:count]


def test_equal_ones_keep_their_order_and_company_changes_no_score(server: Running) -> None:
    body = server.post("/v1/rerank", query="ab", documents=["xy", "ab", "ba", "ab"]).json()
    assert [index for index, _ in results(body)] == [1, 2, 3, 0]
    alone = server.post("/v1/rerank", query="ab", documents=["xy"]).json()
    assert results(alone)[0][1] == results(body)[3][1]


def test_a_bound_of_a_documents_tokens(server: Running) -> None:
    answer = server.post("/v2/rerank", query="ab", documents=["abzzzz", "ab"], max_tokens_per_doc=2)
    assert answer.json()["warnings"] == ["documents[0] was cut from 6 to 2 tokens"]
    assert [score for _, score in results(answer.json())] == [pytest.approx(1.0)] * 2
    # Clients send Cohere's usual 4096 to every model.
    assert server.post("/v2/rerank", query="ab", documents=["ab"], max_tokens_per_doc=4096).status_code == 200
    lower = server.post("/v2/rerank", query="a", documents=["abzzzz"], max_tokens_per_doc=4, truncate_prompt_tokens=3)
    assert lower.json()["warnings"] == ["documents[0] was cut from 6 to 3 tokens"]
    all_of_it = server.post("/v2/rerank", query="a", documents=["abzzzz"], max_tokens_per_doc=4, truncate_prompt_tokens=-1)
    assert all_of_it.json()["warnings"] == ["documents[0] was cut from 6 to 4 tokens"]


@pytest.mark.parametrize("path", RERANK)
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": ["a"], "documents": ["a"]}, "query"),
        ({"query": "a"}, "documents"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "a", "documents": "a"}, "documents"),
        ({"query": "a", "documents": {"0": "a"}}, "documents"),
        ({"query": "a", "documents": ["a", ""]}, "documents[1].text"),
        ({"query": "a", "documents": ["a", 3]}, "documents[1]"),
        ({"query": "a", "documents": [{"title": "a"}]}, "documents[0].text"),
        ({"query": "a", "documents": [{"text": None}]}, "documents[0].text"),
        ({"query": "a", "documents": ["a"] * 1025}, "documents"),
        ({"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
        ({"query": "a", "documents": ["a"], "max_tokens_per_doc": 0}, "max_tokens_per_doc"),
        ({"query": "a", "documents": ["a"], "return_documents": "yes"}, "return_documents"),
        ({"query": "a" * (CONTEXT + 1), "documents": ["a"]}, "query"),
        ({"query": "a", "documents": ["a", "a" * (CONTEXT + 1)]}, "documents[1]"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_rerank_refuses(server: Running, path: str, body: dict[str, object], param: str) -> None:
    error = check(server.post(path, **body))
    # A text stands for an object with a text, so either name is clear.
    assert error["param"] in (param, param.removesuffix(".text"))
    assert not server.engine.requests


@pytest.mark.parametrize("path", SCORE)
@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")])
def test_scores_of_pairs(server: Running, path: str, names: tuple[str, str]) -> None:
    cases: list[tuple[Any, Any, list[tuple[str, str]]]] = [
        ("ab", "abc", [("ab", "abc")]),
        ("ab", ["abc", "ccc"], [("ab", "abc"), ("ab", "ccc")]),
        (["ab"], ["abc", "ccc"], [("ab", "abc"), ("ab", "ccc")]),
        (["ab", "ddd"], ["abc", "ccc"], [("ab", "abc"), ("ddd", "ccc")]),
    ]
    for left, right, pairs in cases:
        body = server.post(path, **{names[0]: left, names[1]: right}).json()
        check_form(body, "ScoreList")
        assert [each["index"] for each in body["data"]] == list(range(len(pairs)))
        np.testing.assert_allclose([each["score"] for each in body["data"]], [cosine(*pair) for pair in pairs], atol=1e-6)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "text_1", "missing_required_parameter"),
        ({"text_1": "a"}, "text_2", "missing_required_parameter"),
        ({"text_2": "a"}, "text_1", "missing_required_parameter"),
        ({"data_2": "a"}, "data_1", "missing_required_parameter"),
        ({"queries": "a"}, "documents", "missing_required_parameter"),
        ({"text_1": "a", "documents": "a"}, "documents", None),
        ({"text_1": "a", "text_2": "a", "data_1": "a"}, "data_1", None),
        ({"queries": "a", "documents": "a", "items": "a"}, "items", None),
        ({"text_1": ["a", "b"], "text_2": "a"}, "text_1", None),
        ({"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1", None),
        ({"text_1": [], "text_2": "a"}, "text_1", "invalid_value"),
        ({"text_1": "a", "text_2": ["a", ""]}, "text_2[1]", "invalid_value"),
        ({"text_1": "a", "text_2": {"content": []}}, "text_2", "invalid_type"),
        ({"text_1": "a", "text_2": ["a"] * 1025}, "text_2", "invalid_value"),
        ({"text_1": "a", "text_2": ["b", "a" * (CONTEXT + 1)]}, "text_2[1]", "context_length_exceeded"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_score_refuses(server: Running, body: dict[str, object], param: str, code: str | None) -> None:
    error = check(server.post("/v1/score", **body))
    assert (error["param"], error["code"]) == (param, code)
    assert not server.engine.requests


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/rerank", {"query": "a", "documents": ["b"]}), ("/v1/score", {"text_1": "a", "text_2": "b"})]
)
def test_when_the_engine_fails(server: Running, path: str, body: dict[str, object]) -> None:
    assert check(server.post(path, **body, model="nobody"), 404)["code"] == "model_not_found"
    server.engine.script = Script(error_after=0, error_status=500)
    check(server.post(path, **body), 500)
    server.engine.refusal = OverloadedError("full")
    check(server.post(path, **body), 429)
