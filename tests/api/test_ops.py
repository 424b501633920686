"""Probes, model list and metrics: what they say in each state of the engine, and that nobody can make the metrics grow."""

from __future__ import annotations

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.api.app import Limits
from service.errors import OverloadedError
from service.metrics import Metrics
from tests.api.conftest import eventually
from tests.api.fakes import CONTEXT, MODEL, Running, Script, running
from tests.api.test_disconnect import ask


def samples(server: Running) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = httpx.get(f"{server.url}/metrics").text
    return {(s.name, frozenset(s.labels.items())): s.value for family in text_string_to_metric_families(text) for s in family.samples}


def total(server: Running, name: str, **labels: str) -> float:
    return sum(value for (each, own), value in samples(server).items() if each == f"braid:{name}" and labels.items() <= set(own))


@pytest.mark.parametrize(
    ("state", "health", "ready", "chat"),
    [
        ("ready", 200, 200, 200),
        ("loading", 503, 503, 503),
        ("stalled", 503, 503, 503),
        ("draining", 200, 503, 503),
        ("dead", 503, 503, 503),
    ],
)
def test_probes(server: Running, state: str, health: int, ready: int, chat: int) -> None:
    server.engine.state = state
    answers = {path: httpx.get(f"{server.url}{path}") for path in ("/live", "/health", "/ping", "/ready")}
    assert [answers[path].status_code for path in ("/live", "/health", "/ping", "/ready")] == [200, health, health, ready]
    assert answers["/ready"].json()["status"] == state
    assert answers["/ready"].json()["progress"] == (0.25 if state == "loading" else 1.0)
    refused = server.chat()
    assert refused.status_code == chat
    if chat == 503:
        assert refused.json()["error"]["type"] == "service_unavailable_error"
        assert refused.json()["error"]["code"] == "server_is_overloaded"
        assert refused.headers["connection"] == "close"
        assert int(refused.headers["retry-after"]) >= 1
        assert server.post("/v1/completions", prompt="a").status_code == 503


def test_model_list(server: Running, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "braid")
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == CONTEXT
    assert model.model_extra["meta"]["n_ctx_train"] == CONTEXT
    assert model.model_extra["meta"]["weight_bytes"] == 1000
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"
    server.engine.state = "loading"
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == MODEL
    assert httpx.get(f"{server.url}/version").json()["version"]


def test_headers_on_every_answer(server: Running) -> None:
    for path in ("/live", "/v1/models", "/nothing", "/metrics"):
        headers = httpx.get(f"{server.url}{path}").headers
        assert headers["x-request-id"].startswith("req_")
        assert int(headers["openai-processing-ms"]) >= 0
    echoed = httpx.get(f"{server.url}/live", headers={"x-request-id": "mine-1"}).headers
    assert echoed.get_list("x-request-id") == ["mine-1"]
    for odd in ("a b", "x" * 129, "<script>"):
        assert httpx.get(f"{server.url}/live", headers={"x-request-id": odd}).headers["x-request-id"].startswith("req_")


def test_numbers_that_the_engine_counts(server: Running) -> None:
    assert total(server, "num_requests_waiting", model_name=MODEL, engine="0") == 2
    assert total(server, "kv_cache_usage_perc") == 0.25
    assert total(server, "prefix_cache_queries_total") == 70
    assert total(server, "prefix_cache_hits_total") == 20
    assert total(server, "num_preemptions_total") == 5
    assert total(server, "prompt_tokens_total") == 70
    assert total(server, "generation_tokens_total") == 30
    assert total(server, "graph_replays_total") == 6
    assert total(server, "graph_misses_total") == 2
    assert total(server, "kernel_compiles_total") == 1
    assert total(server, "spec_decode_num_draft_tokens_total", drafter="lookup") == 12
    assert total(server, "spec_decode_num_accepted_tokens_total", drafter="model") == 3
    assert total(server, "spec_decode_num_accepted_tokens_total", drafter="jacobi") == 0
    assert total(server, "cache_config_info", block_size="16", num_gpu_blocks="1280") == 1
    assert total(server, "engine_ready") == 1


def test_each_choice_is_counted_once_by_its_end(server: Running) -> None:
    names = {
        reason: (lambda reason=reason: total(server, "request_success_total", finished_reason=reason))
        for reason in ("stop", "length", "abort", "error")
    }
    before = {reason: count() for reason, count in names.items()}
    histograms = (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_params_n",
        "request_prompt_tokens",
        "inter_token_latency_seconds",
    )
    counts = {name: total(server, f"{name}_count") for name in histograms}
    server.chat(n=3)
    server.chat(max_tokens=2)
    server.chat(stop="Stop")
    server.engine.script = Script(error_after=2)
    server.chat()
    server.engine.script = Script(waits=0.01)
    ask(server, n=2).close()
    eventually(lambda: names["abort"]() - before["abort"] == 2)
    assert {reason: count() - before[reason] for reason, count in names.items()} == {"stop": 4, "length": 1, "abort": 2, "error": 1}
    grown = {name: total(server, f"{name}_count") - counts[name] for name in histograms}
    assert grown["e2e_request_latency_seconds"] == 8
    assert grown["request_params_n"] == 5
    assert grown["request_prompt_tokens"] == 8
    assert grown["time_to_first_token_seconds"] >= 6
    assert grown["inter_token_latency_seconds"] > 100


def test_rejections_tell_which_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many choices of one request pass the limit of requests though a single one would fit."""
    with running(limits=Limits(max_requests=4)) as small:
        monkeypatch.setattr(type(small.engine), "num_in_flight", 2)
        small.engine.refusal = OverloadedError("full")
        for fields, reason in (({"n": 3}, "max_num_queued_reqs"), ({"n": 2}, "max_num_queued_tokens")):
            before = total(small, "admission_rejections_total", reason=reason)
            assert small.chat(**fields).status_code == 429
            assert total(small, "admission_rejections_total", reason=reason) == before + 1


def test_rejections_are_counted(server: Running) -> None:
    before = total(server, "admission_rejections_total")
    server.engine.refusal = OverloadedError("full")
    server.chat()
    assert total(server, "admission_rejections_total", model_name=MODEL) == before + 1


def test_nobody_makes_the_metrics_grow(server: Running) -> None:
    def ask_everything(word: str) -> None:
        httpx.request(f"M{word}", f"{server.url}/live")
        httpx.get(f"{server.url}/v1/models/{word}")
        httpx.get(f"{server.url}/{word}")
        server.chat(model=word, user=word)
        server.chat(user=word, **{word: 1})

    ask_everything("first")
    names = set(samples(server))
    for number in range(30):
        ask_everything(f"word{number}")
    assert set(samples(server)) == names
    http = total(server, "http_requests_total", route="/v1/models/{model_id:path}", status="404")
    assert http >= 31


def test_the_other_prefix() -> None:
    names = {metric.name for metric in Metrics("vllm", ["m"]).registry.collect()}
    assert {"vllm:time_to_first_token_seconds", "vllm:request_success", "vllm:iteration_tokens_total"} <= names
    assert not any(name.startswith("braid") for name in names)
