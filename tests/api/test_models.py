"""The list of models: what OpenAI's, vLLM's, llama-server's and Anthropic's clients read in it, also while the engine is loading."""

from __future__ import annotations

import anthropic
import httpx
import openai
import pytest

from tests.api.fakes import CONTEXT, MODEL, Running


def test_what_is_known_of_a_model(server: Running, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "braid")
    extra = model.model_extra or {}
    assert extra["max_model_len"] == CONTEXT
    assert extra["modalities"] == {"input": ["text"], "output": ["text"]}
    assert extra["meta"]["n_ctx_train"] == CONTEXT
    assert extra["meta"]["dtype"] == "int8"
    assert client.models.retrieve(MODEL) == model


def test_capabilities_are_the_models_own(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, bool]:
        capabilities: dict[str, bool] = httpx.get(f"{server.url}/v1/models/{MODEL}").json()["meta"]["capabilities"]
        return capabilities

    assert (found()["completion"], found()["chat"], found()["tools"], found()["vision"]) == (True, False, False, False)
    monkeypatch.setattr(server.codec, "template", object())
    assert (found()["chat"], found()["tools"]) == (True, True)
    info = server.engine.infos[MODEL]
    encoder = type(info)(**{**{name: getattr(info, name) for name in info.__struct_fields__}, "can_generate": False, "vector_width": 384})
    monkeypatch.setitem(server.engine.infos, MODEL, encoder)
    assert {name for name, can in found().items() if can} == {"embedding"}
    assert httpx.get(f"{server.url}/v1/models/{MODEL}").json()["modalities"]["output"] == ["embedding"]


def test_the_list_while_loading(server: Running) -> None:
    server.engine.state = "loading"
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == (MODEL, CONTEXT)
    assert "dtype" not in model["meta"]


def test_anthropics_client_reads_it_too(server: Running) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as claude:
        (model,) = claude.models.list()
        assert (model.id, model.type, model.display_name) == (MODEL, "model", MODEL)
        assert model.created_at.year > 2000
        assert claude.models.retrieve(MODEL).id == MODEL


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_head_is_get_without_its_body(server: Running) -> None:
    for path in ("/v1/models", f"/v1/models/{MODEL}", "/health", "/live"):
        got, headed = httpx.get(server.url + path), httpx.head(server.url + path)
        assert (headed.status_code, headed.content) == (got.status_code, b"")
        assert headed.headers["content-length"] == str(len(got.content))
